"""Which workers hold which KV blocks, as far as their events have told."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from protocol.block_hash import BlockHash
from protocol.ids import Incarnation, WorkerId
from protocol.records import BlocksCleared, BlocksRemoved, BlocksStored, KVEventBatch

DEFAULT_MAX_BLOCKS = 16_000_000


class IndexState(StrEnum):
    """EXACT: every event up to now is in. DEGRADED: some are missing; hits are still likely."""

    EXACT = "exact"
    DEGRADED = "degraded"


@dataclass(slots=True)
class _Holder:
    bit: int
    incarnation: Incarnation | None = None
    sequence: int = -1
    has_gap: bool = False  # batches are missing; a resync brings what they said
    is_truncated: bool = False  # not all of its blocks fitted
    hashes: set[BlockHash] = field(default_factory=set[BlockHash])


class PrefixIndex:
    """Block hash → workers, as one bit a worker in an int, so that a lookup is one `&` a block.

    Memory is bounded by `max_blocks` (block, worker) pairs: a worker that would exceed it is
    remembered as DEGRADED with the blocks that fitted. A wrong entry costs time, never
    correctness, because workers look into their own pools.
    """

    def __init__(self, max_blocks: int = DEFAULT_MAX_BLOCKS) -> None:
        self._max_blocks = max_blocks
        self._num_blocks = 0
        self._holders: dict[WorkerId, _Holder] = {}
        self._by_bit: dict[int, WorkerId] = {}
        self._masks: dict[BlockHash, int] = {}

    @property
    def num_blocks(self) -> int:
        """(block, worker) pairs."""
        return self._num_blocks

    def state(self, worker_id: WorkerId) -> IndexState:
        """DEGRADED for an unknown worker too: nothing is known of its blocks."""
        holder = self._holders.get(worker_id)
        if holder is None or holder.has_gap or holder.is_truncated:
            return IndexState.DEGRADED
        return IndexState.EXACT

    def match(self, hashes: Sequence[BlockHash]) -> dict[WorkerId, int]:
        """How many of the first blocks each worker holds without a gap; only those with any."""
        matched: dict[WorkerId, int] = {}
        masks = self._masks
        present = -1
        for position, block_hash in enumerate(hashes):
            still = masks.get(block_hash, 0) & present
            if still != present:
                if position:
                    self._note(present & ~still, position, matched)
                if not still:
                    return matched
                present = still
        if hashes:
            self._note(present, len(hashes), matched)
        return matched

    def apply(self, worker_id: WorkerId, batch: KVEventBatch) -> bool:
        """Takes a batch in; False if one before it is missing: then the worker needs a `resync`.

        What a batch behind a gap says is true nevertheless and taken in. Batches that the last
        `resync` contained already are ignored.
        """
        holder = self._holders.get(worker_id)
        if holder is None or holder.incarnation != batch.incarnation:
            return False
        if batch.sequence <= holder.sequence:
            return True
        if batch.sequence != holder.sequence + 1:
            holder.has_gap = True
        holder.sequence = batch.sequence
        for event in batch.events:
            match event:
                case BlocksStored(_, hashes):
                    self._store(holder, hashes)
                case BlocksRemoved(hashes):
                    self._remove(holder, hashes)
                case BlocksCleared():
                    self._remove(holder, list(holder.hashes))
        return not holder.has_gap

    def resync(
        self,
        worker_id: WorkerId,
        incarnation: Incarnation,
        *,
        sequence: int,
        hashes: set[BlockHash],
    ) -> None:
        """The worker's blocks are exactly `hashes`, as of batch `sequence`."""
        holder = self._holders.get(worker_id)
        if holder is None:
            holder = self._add_holder(worker_id)
        holder.incarnation = incarnation
        holder.sequence = sequence
        holder.has_gap = holder.is_truncated = False
        self._remove(holder, holder.hashes - hashes)
        self._store(holder, hashes - holder.hashes)

    def degrade(self, worker_id: WorkerId) -> None:
        """Events of this worker may be missing from now on, until the next `resync`."""
        holder = self._holders.get(worker_id)
        if holder is not None:
            holder.has_gap = True

    def remove_worker(self, worker_id: WorkerId) -> None:
        """Forgets the worker, in time proportional to its own blocks."""
        holder = self._holders.pop(worker_id, None)
        if holder is not None:
            self._remove(holder, list(holder.hashes))
            del self._by_bit[holder.bit]

    def check_integrity(self) -> None:
        """Raises AssertionError if the two directions of the mapping disagree. Slow; for tests."""
        pairs = sum(mask.bit_count() for mask in self._masks.values())
        assert pairs == self._num_blocks == sum(len(h.hashes) for h in self._holders.values())
        for holder in self._holders.values():
            assert all(self._masks[block_hash] & holder.bit for block_hash in holder.hashes)

    def _note(self, bits: int, num_blocks: int, matched: dict[WorkerId, int]) -> None:
        while bits:
            bit = bits & -bits
            matched[self._by_bit[bit]] = num_blocks
            bits ^= bit

    def _add_holder(self, worker_id: WorkerId) -> _Holder:
        bit = 1
        while bit in self._by_bit:
            bit <<= 1
        holder = _Holder(bit)
        self._holders[worker_id] = holder
        self._by_bit[bit] = worker_id
        return holder

    def _store(self, holder: _Holder, hashes: Sequence[BlockHash] | set[BlockHash]) -> None:
        masks, bit, held = self._masks, holder.bit, holder.hashes
        for block_hash in hashes:
            if block_hash in held:
                continue
            if self._num_blocks >= self._max_blocks:
                holder.is_truncated = True
                return
            held.add(block_hash)
            masks[block_hash] = masks.get(block_hash, 0) | bit
            self._num_blocks += 1

    def _remove(self, holder: _Holder, hashes: Sequence[BlockHash] | set[BlockHash]) -> None:
        masks, bit, held = self._masks, holder.bit, holder.hashes
        for block_hash in hashes:
            if block_hash not in held:
                continue
            held.remove(block_hash)
            self._num_blocks -= 1
            left = masks[block_hash] ^ bit
            if left:
                masks[block_hash] = left
            else:
                del masks[block_hash]
