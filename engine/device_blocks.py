"""Copies between a CUDA pool's blocks and memory that other processes may be given."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# Rows are copied as elements of this type where they divide evenly; bytes are far slower.
_WIDE = torch.complex128
# Runs of at least this size on average are copied one by one, at four times the speed of an index
# but for some microseconds each.
_LONG_RUN_BYTES = 4 << 20

Run = tuple[int, int]
"""First block and number of blocks."""


class DeviceBlocks:
    """Copies run on a stream of their own, beside the engine's steps, and are done on return.

    What they read must be complete, and `Engine.execute` returns no earlier than that.
    """

    def __init__(self, kv_pool: Tensor) -> None:
        """`kv_pool` is [num_blocks, …], contiguous."""
        self._bytes = kv_pool.view(kv_pool.shape[0], -1).view(torch.uint8)
        self._element = torch.uint8 if self._bytes.shape[1] % _WIDE.itemsize else _WIDE
        self._rows = self._bytes.view(self._element)
        # Small copies that a request waits for go before a step's next kernel.
        self._stream = torch.cuda.Stream(kv_pool.device, priority=-1)

    def allocate(self, num_bytes: int) -> "DeviceStaging":
        # The allocator may hand out what kernels of the *same* stream still use.
        with torch.cuda.stream(self._stream):
            return DeviceStaging(
                self, torch.empty(num_bytes, dtype=torch.uint8, device=self._bytes.device)
            )

    def view(self, first: int, count: int) -> "DeviceStaging":
        """Bytes of the pool itself."""
        return DeviceStaging(self, self._bytes[first : first + count].view(-1))

    def to_host(self, first: int, count: int) -> memoryview:
        with torch.cuda.stream(self._stream):
            return memoryview(self._bytes[first : first + count].cpu().numpy().tobytes())

    def gather(self, runs: Sequence[Run], into: Tensor) -> None:
        """Copies blocks one behind the other to the start of `into`, uint8 [num_bytes]."""
        rows = self._rows_of(into, runs)
        with torch.cuda.stream(self._stream):
            if self._are_long(runs):
                for (first, count), piece in zip(runs, _pieces(rows, runs), strict=True):
                    piece.copy_(self._rows[first : first + count])
            else:
                torch.index_select(self._rows, 0, self._index(runs), out=rows)
        self._stream.synchronize()

    def scatter(self, source: Tensor, runs: Sequence[Run]) -> None:
        """The inverse of `gather`."""
        rows = self._rows_of(source, runs)
        with torch.cuda.stream(self._stream):
            if self._are_long(runs):
                for (first, count), piece in zip(runs, _pieces(rows, runs), strict=True):
                    self._rows[first : first + count].copy_(piece)
            else:
                self._rows.index_copy_(0, self._index(runs), rows)
        self._stream.synchronize()

    def _are_long(self, runs: Sequence[Run]) -> bool:
        num_bytes = sum(count for _, count in runs) * self._bytes.shape[1]
        return num_bytes >= len(runs) * _LONG_RUN_BYTES

    def _index(self, runs: Sequence[Run]) -> Tensor:
        block_ids = [block_id for first, count in runs for block_id in range(first, first + count)]
        # Pinned, so that the copy doesn't wait; the caller waits for the stream before it returns.
        index = torch.tensor(block_ids, dtype=torch.int64).pin_memory()
        return index.to(self._bytes.device, non_blocking=True)

    def _rows_of(self, staging: Tensor, runs: Sequence[Run]) -> Tensor:
        num_blocks = sum(count for _, count in runs)
        num_bytes = num_blocks * self._bytes.shape[1]
        return staging[:num_bytes].view(self._element).view(num_blocks, -1)


def _pieces(rows: Tensor, runs: Sequence[Run]) -> Sequence[Tensor]:
    """The staging rows of each run."""
    return rows.split([count for _, count in runs])


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
