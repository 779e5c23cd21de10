"""C kernels for CPU: compiled on first use, called through ctypes.

Whoever lacks a compiler or the instructions gets None from `native_kernel`, and uses torch.
"""
