"""What only Hopper GPUs can run, written in Gluon, Triton's language one level down.

Gluon leaves shared memory, barriers and the division of work among warps to the kernel. Triton's
interpreter can't run it: tests/gpu compares it with the references on a card, and what is beside
this package does the same work everywhere. `tests/unit/kernels/gluon_model.py` runs its source,
without the layouts of registers, on a CPU.
"""
