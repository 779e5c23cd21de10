"""CPU memory in huge pages, for weights and KV: what is read by the gigabyte each step.

With pages of 4 KiB the CPU's prefetchers stop, and an address translation starts, every 4 KiB:
linear layers of one token take a quarter longer.
"""

import ctypes
import math
import sys
from collections.abc import Sequence

import torch
from torch import Tensor

_HUGE_PAGE_BYTES = 2 << 20
_SLAB_BYTES = 64 << 20
_MADV_HUGEPAGE = 14


class HugePageArena:
    """Tensors cut one after the other from slabs, so that small weights share huge pages too.

    A slab is freed with the last tensor in it: for things that live and die together.
    """

    def __init__(self) -> None:
        self._slab = torch.empty(0, dtype=torch.uint8)
        self._used_bytes = 0

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """An uninitialised contiguous tensor, aligned to a cache line at least."""
        num_bytes = math.prod(shape) * dtype.itemsize
        if num_bytes > len(self._slab) - self._used_bytes:
            if num_bytes >= _SLAB_BYTES // 2:
                return empty_in_huge_pages(shape, dtype)
            self._slab = empty_in_huge_pages((_SLAB_BYTES,), torch.uint8)
            self._used_bytes = 0
        piece = self._slab[self._used_bytes : self._used_bytes + num_bytes]
        self._used_bytes += -(-num_bytes // 64) * 64
        return piece.view(dtype).view(*shape)


def empty_in_huge_pages(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """An uninitialised contiguous tensor of its own, in huge pages where the system has them."""
    num_bytes = math.prod(shape) * dtype.itemsize
    if num_bytes < _HUGE_PAGE_BYTES:
        return torch.empty(shape, dtype=dtype)
    whole_pages = -(-num_bytes // _HUGE_PAGE_BYTES) * _HUGE_PAGE_BYTES
    memory = torch.empty(whole_pages + _HUGE_PAGE_BYTES, dtype=torch.uint8)
    start = -memory.data_ptr() % _HUGE_PAGE_BYTES
    _advise_huge_pages(memory.data_ptr() + start, whole_pages)
    return memory[start : start + num_bytes].view(dtype).view(*shape)


def _advise_huge_pages(address: int, num_bytes: int) -> None:
    if sys.platform == "linux":
        # A kernel without huge pages refuses, which leaves the memory as good as any.
        ctypes.CDLL(None).madvise(
            ctypes.c_void_p(address), ctypes.c_size_t(num_bytes), _MADV_HUGEPAGE
        )
