"""Triton kernels, one operation a file, for CUDA tensors that the wrappers have checked.

Imported by the wrappers on first use: a machine without a GPU needs no Triton. Every kernel also
runs in Triton's interpreter (`TRITON_INTERPRET=1`), where tests compare it with its reference;
those in `hopper/` run in the tests' own model instead.
"""
