"""A region in the memory of a CUDA device; who copies there is handed in, so no torch is needed.

Between two processes of one host, KV goes by `cuda_ipc`: the *sender* copies into memory that the
receiver has exported, whenever the device gets to it. It could still do so after it was dropped,
having been stopped in between. So peers never get a block: every message is received into staging
memory, and only this process copies from there into blocks, while the write's fence is open. That
keeps the promise of host memory (no late write can land in the pool) for one more copy on the
device.

Where both processes are on *one* device, or on two that reach each other's memory (NVLink), the
receiver maps the sender's pool and reads it with a kernel of its own, from blocks to blocks: no
staging, no message but the announcement, and again nobody else writes into the pool.
"""

import logging
from collections.abc import Sequence
from typing import Protocol

from kvtransfer.block_ids import BlockIds, check_block_range
from kvtransfer.buffer import Buffer, DeviceBuffer
from kvtransfer.pool_reader import PeerPool
from kvtransfer.region import Run

logger = logging.getLogger(__name__)


class DeviceBlocks(Protocol):
    """The pool's blocks on the device."""

    def allocate(self, num_bytes: int) -> DeviceBuffer:
        """New memory that peers may be given."""
        ...

    def view(self, first: int, count: int) -> DeviceBuffer:
        """A contiguous run of blocks, not copied."""
        ...

    def to_host(self, first: int, count: int) -> memoryview:
        """A copy of a run in host memory."""
        ...

    def export(self) -> bytes:
        """For `map` in another process of this host. Raises OSError if it can't be shared."""
        ...

    def map(self, exported: bytes) -> PeerPool:
        """Another process's pool, to copy from. Raises OSError if it's out of reach."""
        ...


class DeviceRegion:
    """See `kvtransfer.region.Region`."""

    peers_write = True

    def __init__(self, blocks: DeviceBlocks, *, num_blocks: int, block_bytes: int) -> None:
        self.num_blocks = num_blocks
        self.block_bytes = block_bytes
        self._blocks = blocks

    def allocate(self, num_bytes: int) -> Buffer:
        return self._blocks.allocate(num_bytes)

    def view(self, run: Run) -> Buffer:
        return self._blocks.view(*run)

    def host_bytes(self, run: Run) -> memoryview:
        return self._blocks.to_host(*run)

    def gather(self, runs: Sequence[Run], into: Buffer) -> int:
        assert not isinstance(into, memoryview)
        into.gather(runs)
        return sum(count for _, count in runs) * self.block_bytes

    def scatter(self, source: Buffer, runs: Sequence[Run]) -> None:
        assert not isinstance(source, memoryview)
        source.scatter(runs)

    def check_range(self, block_ids: BlockIds) -> None:
        check_block_range(block_ids, self.num_blocks)

    def export(self) -> bytes | None:
        try:
            return self._blocks.export()
        except OSError as error:
            logger.warning("peers can't read this KV pool themselves: %s", error)
            return None

    def map(self, exported: bytes) -> PeerPool | None:
        try:
            return self._blocks.map(exported)
        except OSError as error:
            logger.info("can't read a peer's KV pool: %s", error)
            return None
