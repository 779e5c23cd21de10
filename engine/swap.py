"""Host memory for the KV blocks of preempted sequences; `scheduler/swap.py` keeps its books."""

import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import psutil
import torch
from torch import Tensor

from engine.config import EngineConfig
from engine.gpu_memory import gib
from engine.kv_memory import allocate_kv_pool
from engine.scheduler.swap import BlockCopies
from protocol.errors import StartupError
from protocol.layout import KVLayout


class HostBlocks:
    """`num_blocks` blocks as large as the pool's, pinned if that is on a GPU."""

    def __init__(self, kv_pool: Tensor, layout: KVLayout, num_blocks: int) -> None:
        """`kv_pool` is [num_blocks, num_layers, 2, num_kv_heads, block_size, head_dim].

        Raises StartupError if this machine hasn't as much memory.
        """
        num_bytes = num_blocks * layout.block_bytes
        available_bytes = psutil.virtual_memory().available
        if num_bytes > available_bytes:
            raise StartupError(
                f"--swap-space asks for {gib(num_bytes)} of host memory, but "
                f"{gib(available_bytes)} are available; lower it."
            )
        self.num_blocks = num_blocks
        self._pool = kv_pool
        self._blocks = allocate_kv_pool(layout, num_blocks, device=torch.device("cpu"))
        if kv_pool.is_cuda:
            _pin(self._blocks)
            # Before the memory is gone: the driver would take whatever comes there for pinned.
            weakref.finalize(self, _unpin, self._blocks.data_ptr()).atexit = False

    def run(self, copies: BlockCopies) -> None:
        """On a GPU in the order of the current stream, without waiting for it."""
        for block, host_block, count in _runs(copies.out):
            self._blocks[host_block : host_block + count].copy_(
                self._pool[block : block + count], non_blocking=True
            )
        for block, host_block, count in _runs(copies.back):
            self._pool[block : block + count].copy_(
                self._blocks[host_block : host_block + count], non_blocking=True
            )


def num_swap_blocks(config: EngineConfig, layout: KVLayout) -> int:
    """How many blocks of host memory the settings ask for."""
    if config.preemption_mode != "swap":
        return 0
    return int(config.swap_space * 2**30) // layout.block_bytes


def _runs(pairs: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int, int]]:
    """Pairs that follow each other at both ends, as (first, first, count)."""
    start = 0
    for i in range(1, len(pairs) + 1):
        first, second = pairs[i - 1]
        if i == len(pairs) or pairs[i] != (first + 1, second + 1):
            yield *pairs[start], i - start
            start = i


def _pin(blocks: Tensor) -> None:
    """Lets the device copy from and to the memory by itself.

    Not torch's own pinned memory: that comes in powers of two.
    """
    error = _runtime().cudaHostRegister(blocks.data_ptr(), blocks.nbytes, 0)
    if int(error) != 0:
        raise StartupError(
            f"The driver can't pin {gib(blocks.nbytes)} of host memory ({error}); lower "
            "--swap-space, or raise the limit of locked memory (ulimit -l)."
        )


def _unpin(address: int) -> None:
    _runtime().cudaHostUnregister(address)


def _runtime() -> Any:  # noqa: ANN401  (torch has no type for it)
    return torch.cuda.cudart()
