"""Copies between a CUDA pool's blocks and memory that other processes may be given."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine.block_copier import BlockCopier, BlockIds
from engine.peer_blocks import PeerBlocks, export_blocks

Run = tuple[int, int]
"""First block and number of blocks."""


class DeviceBlocks:
    """Copies run on a stream of their own; those of `gather` and `scatter` are done on return.

    What they read must be complete, and `Engine.execute` returns no earlier than that.
    """

    def __init__(self, kv_pool: Tensor) -> None:
        """`kv_pool` is [num_blocks, …], contiguous."""
        self._bytes = kv_pool.view(kv_pool.shape[0], -1).view(torch.uint8)
        self._copier = BlockCopier(kv_pool.device)
        # Compiles the kernel now, not when a request waits.
        self.gather([(0, 1)], torch.empty_like(self._bytes[0]))

    def allocate(self, num_bytes: int) -> "DeviceStaging":
        # The allocator may hand out what kernels of the *same* stream still use.
        with torch.cuda.stream(self._copier.stream):
            return DeviceStaging(
                self, torch.empty(num_bytes, dtype=torch.uint8, device=self._bytes.device)
            )

    def view(self, first: int, count: int) -> "DeviceStaging":
        """Bytes of the pool itself."""
        return DeviceStaging(self, self._bytes[first : first + count].view(-1))

    def to_host(self, first: int, count: int) -> memoryview:
        with torch.cuda.stream(self._copier.stream):
            return memoryview(self._bytes[first : first + count].cpu().numpy().tobytes())

    def gather(self, runs: Sequence[Run], into: Tensor) -> None:
        """Copies blocks one behind the other to the start of `into`, uint8 [num_bytes]."""
        ids = _block_ids(runs)
        rows = self._rows_of(into, len(ids))
        self._copier.start(self._bytes, ids, rows, _in_order(ids)).wait()

    def scatter(self, source: Tensor, runs: Sequence[Run]) -> None:
        """The inverse of `gather`."""
        ids = _block_ids(runs)
        rows = self._rows_of(source, len(ids))
        self._copier.start(rows, _in_order(ids), self._bytes, ids).wait()

    def export(self) -> bytes:
        """For `map` in another process of this host. Raises OSError if it can't be shared."""
        return export_blocks(self._bytes)

    def map(self, exported: bytes) -> PeerBlocks:
        """Another process's pool, to copy from. Raises OSError if it's out of reach."""
        return PeerBlocks(exported, self._bytes, self._copier)

    def _rows_of(self, staging: Tensor, num_blocks: int) -> Tensor:
        return staging[: num_blocks * self._bytes.shape[1]].view(num_blocks, -1)


def _block_ids(runs: Sequence[Run]) -> BlockIds:
    pieces = [np.arange(first, first + count, dtype=np.uint32) for first, count in runs]
    return np.concatenate(pieces)


def _in_order(ids: BlockIds) -> BlockIds:
    """Places in staging memory for so many blocks."""
    return np.arange(len(ids), dtype=np.uint32)


@dataclass(frozen=True, slots=True, eq=False)
class DeviceStaging:
    """Contiguous bytes on the pool's device, as transports take them: uint8 [num_bytes]."""

    blocks: DeviceBlocks
    data: Tensor

    @property
    def nbytes(self) -> int:
        return self.data.numel()

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {
            "shape": (self.nbytes,),
            "strides": None,
            "typestr": "|u1",
            "data": (self.data.data_ptr(), False),
            "version": 3,
        }

    def __getitem__(self, piece: slice, /) -> "DeviceStaging":
        return DeviceStaging(self.blocks, self.data[piece])

    def gather(self, runs: Sequence[Run]) -> None:
        self.blocks.gather(runs, self.data)

    def scatter(self, runs: Sequence[Run]) -> None:
        self.blocks.scatter(self.data, runs)
