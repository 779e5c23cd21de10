"""The registered memory that transfers read from and write into: one pool of equal blocks."""

import ctypes
from collections.abc import Sequence
from typing import Protocol, Self

from kvtransfer.block_ids import BlockIds, check_block_range
from kvtransfer.buffer import Buffer
from kvtransfer.pool_reader import PeerPool
from protocol.errors import TransferError

Run = tuple[int, int]
"""First block and number of blocks of one contiguous piece of a pool."""


class Region(Protocol):
    """`num_blocks` blocks of `block_bytes` each, one behind the other."""

    @property
    def num_blocks(self) -> int: ...

    @property
    def block_bytes(self) -> int: ...

    @property
    def peers_write(self) -> bool:
        """True if a peer itself writes into what it's given to send to, perhaps late: then it's
        given staging memory, never a block. False if this process reads the peer's memory."""
        ...

    def allocate(self, num_bytes: int) -> Buffer:
        """Staging memory of the same kind."""
        ...

    def view(self, run: Run) -> Buffer:
        """The bytes of a contiguous run of blocks, not copied."""
        ...

    def host_bytes(self, run: Run) -> memoryview:
        """The same in host memory, perhaps a copy."""
        ...

    def gather(self, runs: Sequence[Run], into: Buffer) -> int:
        """Copies runs one behind the other into `into`; returns the number of bytes."""
        ...

    def scatter(self, source: Buffer, runs: Sequence[Run]) -> None:
        """The inverse of `gather`."""
        ...

    def check_range(self, block_ids: BlockIds) -> None:
        """Raises TransferError if a block isn't in the region."""
        ...

    def export(self) -> bytes | None:
        """What a peer's `map` needs to read this region by itself; None if it can't."""
        ...

    def map(self, exported: bytes) -> PeerPool | None:
        """A peer's region, from its `export`; None if it's out of reach."""
        ...


class KVRegion:
    """A region in host memory.

    `memory` must be writable, contiguous and stay where it is for the region's life.
    """

    peers_write = False

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

    def allocate(self, num_bytes: int) -> memoryview:
        return memoryview(bytearray(num_bytes))

    def view(self, run: Run) -> memoryview:
        first, count = run
        return self._view[first * self.block_bytes : (first + count) * self.block_bytes]

    def host_bytes(self, run: Run) -> memoryview:
        return self.view(run)

    def gather(self, runs: Sequence[Run], into: Buffer) -> int:
        assert isinstance(into, memoryview)
        offset = 0
        for run in runs:
            piece = self.view(run)
            into[offset : offset + piece.nbytes] = piece
            offset += piece.nbytes
        return offset

    def scatter(self, source: Buffer, runs: Sequence[Run]) -> None:
        assert isinstance(source, memoryview)
        offset = 0
        for run in runs:
            piece = self.view(run)
            piece[:] = source[offset : offset + piece.nbytes]
            offset += piece.nbytes

    def check_range(self, block_ids: BlockIds) -> None:
        check_block_range(block_ids, self.num_blocks)

    def export(self) -> bytes | None:
        return None  # the transport reads host memory as fast

    def map(self, exported: bytes) -> PeerPool | None:
        del exported
        return None
