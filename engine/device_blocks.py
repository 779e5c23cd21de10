"""Copies between a CUDA pool's blocks and memory that other processes may be given."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# Rows are copied as elements of this type where they divide evenly; bytes are far slower.
_WIDE = torch.complex128


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

    def gather(self, block_ids: Sequence[int], into: Tensor) -> None:
        """Copies blocks one behind the other to the start of `into`, uint8 [num_bytes]."""
        with torch.cuda.stream(self._stream):
            torch.index_select(
                self._rows, 0, self._index(block_ids), out=self._rows_of(into, len(block_ids))
            )
        self._stream.synchronize()

    def scatter(self, source: Tensor, block_ids: Sequence[int]) -> None:
        """The inverse of `gather`."""
        with torch.cuda.stream(self._stream):
            self._rows.index_copy_(0, self._index(block_ids), self._rows_of(source, len(block_ids)))
        self._stream.synchronize()

    def _index(self, block_ids: Sequence[int]) -> Tensor:
        return torch.tensor(block_ids, dtype=torch.int64, device=self._bytes.device)

    def _rows_of(self, staging: Tensor, num_blocks: int) -> Tensor:
        num_bytes = num_blocks * self._bytes.shape[1]
        return staging[:num_bytes].view(self._element).view(num_blocks, -1)


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

    def gather(self, block_ids: Sequence[int]) -> None:
        self.blocks.gather(block_ids, self.data)

    def scatter(self, block_ids: Sequence[int]) -> None:
        self.blocks.scatter(self.data, block_ids)
