"""The registered memory that transfers read from and write into: one pool of equal blocks."""

import ctypes
from collections.abc import Iterable
from typing import Self

from protocol.errors import TransferError

Run = tuple[int, int]
"""First block and number of blocks of one contiguous piece of a pool."""


class KVRegion:
    """`num_blocks` blocks of `block_bytes` each, one behind the other.

    `memory` must be writable, contiguous and stay where it is for the region's life.
    """

    def __init__(self, memory: memoryview, *, num_blocks: int, block_bytes: int) -> None:
        view = memory.cast("B")
        if view.readonly:
            raise TransferError("The KV region's memory is read-only.")
        if view.nbytes != num_blocks * block_bytes:
            raise TransferError(
                f"The KV region has {view.nbytes} bytes, but {num_blocks} blocks of "
                f"{block_bytes} bytes need {num_blocks * block_bytes}."
            )
        self.num_blocks = num_blocks
        self.block_bytes = block_bytes
        self._view = view

    @classmethod
    def from_address(cls, address: int, *, num_blocks: int, block_bytes: int) -> Self:
        """A region at a raw pointer, as `Tensor.data_ptr()` gives it; the caller keeps it alive."""
        array = (ctypes.c_ubyte * (num_blocks * block_bytes)).from_address(address)
        return cls(memoryview(array).cast("B"), num_blocks=num_blocks, block_bytes=block_bytes)

    def view(self, run: Run) -> memoryview:
        """The bytes of a contiguous run of blocks, not copied."""
        first, count = run
        return self._view[first * self.block_bytes : (first + count) * self.block_bytes]

    def gather(self, runs: Iterable[Run], into: memoryview) -> int:
        """Copies runs one behind the other into `into`; returns the number of bytes."""
        offset = 0
        for run in runs:
            piece = self.view(run)
            into[offset : offset + piece.nbytes] = piece
            offset += piece.nbytes
        return offset

    def scatter(self, source: memoryview, runs: Iterable[Run]) -> None:
        """The inverse of `gather`."""
        offset = 0
        for run in runs:
            piece = self.view(run)
            piece[:] = source[offset : offset + piece.nbytes]
            offset += piece.nbytes

    def check_range(self, block_ids: Iterable[int]) -> None:
        """Raises TransferError if a block isn't in the region."""
        for block_id in block_ids:
            if not 0 <= block_id < self.num_blocks:
                raise TransferError(
                    f"Block {block_id} is outside the pool of {self.num_blocks} blocks."
                )
