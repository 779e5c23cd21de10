"""Random holders on a small pool, against a model that knows who holds what and why."""

from collections import Counter
from dataclasses import dataclass, field

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from engine.block_pool import BlockOwnershipError, BlockPool
from protocol.block_hash import BlockHash, hash_block, root_hash
from protocol.records import BlocksCleared, BlocksRemoved, BlocksStored

NUM_BLOCKS = 12
ROOTS = (root_hash("model"), root_hash("model", cache_salt="tenant"))
contents = st.lists(st.integers(0, 1), min_size=1, max_size=6)


@dataclass(eq=False)
class Holder:
    root: BlockHash
    hashes: list[BlockHash]
    block_ids: list[int]
    num_registered: int = 0
    pins: list[list[int]] = field(default_factory=list)


def chain(root: BlockHash, symbols: list[int]) -> list[BlockHash]:
    hashes: list[BlockHash] = []
    for symbol in symbols:
        hashes.append(hash_block(hashes[-1] if hashes else root, [symbol]))
    return hashes


class BlockPoolMachine(RuleBasedStateMachine):
    holders = Bundle("holders")
    pins = Bundle("pins")
    quarantines = Bundle("quarantines")

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(NUM_BLOCKS, 1)
        self.references: Counter[int] = Counter()
        self.quarantined: set[int] = set()
        self.content: dict[int, BlockHash] = {}  # what the block's last allocator wrote
        self.parent_of: dict[BlockHash, BlockHash] = {}
        self.mirror: set[BlockHash] = set()

    @rule(target=holders, symbols=contents, root=st.sampled_from(ROOTS))
    def start(self, symbols, root):
        hashes = chain(root, symbols)
        available = self.pool.num_available_blocks
        expected = self.pool.num_prefix_blocks(hashes)
        matched = self.pool.match_prefix(hashes)
        assert len(matched) == expected
        assert [self.content[block] for block in matched] == hashes[: len(matched)]
        left = self.pool.num_available_blocks
        assert left <= available
        fresh = self.pool.allocate(len(hashes) - len(matched))
        assert (fresh is None) == (len(hashes) - len(matched) > left)
        if fresh is None:
            self.pool.free(matched)
            return Holder(root, [], [])
        assert fresh == sorted(set(fresh))
        assert not any(self.references[block] for block in fresh)
        assert self.quarantined.isdisjoint(fresh)
        for block, block_hash in zip(fresh, hashes[len(matched) :], strict=True):
            self.content[block] = block_hash
        for parent, block_hash in zip([root, *hashes], hashes, strict=False):
            self.parent_of[block_hash] = parent
        self.references.update(matched + fresh)
        return Holder(root, hashes, matched + fresh, len(matched))

    @rule(holder=holders, num_blocks=st.integers(1, 3))
    def register(self, holder, num_blocks):
        if not holder.block_ids:
            return
        upto = min(len(holder.hashes), holder.num_registered + num_blocks)
        self.pool.register(
            holder.block_ids, holder.hashes[:upto], root=holder.root, first=holder.num_registered
        )
        holder.num_registered = upto

    @rule(holder=consumes(holders))
    def finish(self, holder):
        self.pool.free(holder.block_ids)
        self.references.subtract(holder.block_ids)

    @rule(target=pins, holder=holders, start=st.integers(0, 5), stop=st.integers(0, 6))
    def pin(self, holder, start, stop):
        pinned = holder.block_ids[start:stop]
        self.pool.pin(pinned)
        self.references.update(pinned)
        return pinned

    @rule(pinned=consumes(pins))
    def unpin(self, pinned):
        self.pool.free(pinned)
        self.references.subtract(pinned)

    @rule(target=quarantines, num_blocks=st.integers(0, 4))
    def cancel_reservation(self, num_blocks):
        fresh = self.pool.allocate(num_blocks)
        if fresh is None:
            return []
        self.pool.quarantine(fresh)
        self.quarantined.update(fresh)
        return fresh

    @rule(blocks=consumes(quarantines))
    def stop_reservation(self, blocks):
        self.pool.release_quarantine(blocks)
        self.quarantined.difference_update(blocks)

    @rule()
    def reset(self):
        self.pool.reset_cache()
        counts = self.pool.counts
        assert counts.cached == 0

    @rule(block=st.integers(0, NUM_BLOCKS - 1))
    def misuse(self, block):
        if self.references[block] == 0:
            for operation in (self.pool.free, self.pool.pin, self.pool.quarantine):
                with pytest.raises(BlockOwnershipError):
                    operation([block])
        if block not in self.quarantined:
            with pytest.raises(BlockOwnershipError):
                self.pool.release_quarantine([block])

    @invariant()
    def every_block_is_in_one_state(self):
        self.pool.check_integrity()
        counts = self.pool.counts
        assert counts.free + counts.referenced + counts.cached + counts.quarantined == NUM_BLOCKS
        assert counts.quarantined == len(self.quarantined)
        for block in range(NUM_BLOCKS):
            assert self.pool.num_references(block) == self.references[block]

    @invariant()
    def events_tell_a_cache_without_gaps(self):
        for event in self.pool.drain_events():
            match event:
                case BlocksStored(parent, hashes):
                    assert parent in ROOTS or parent in self.mirror
                    for before, block_hash in zip([parent, *hashes], hashes, strict=False):
                        assert self.parent_of[block_hash] == before
                    assert self.mirror.isdisjoint(hashes)
                    self.mirror.update(hashes)
                case BlocksRemoved(hashes):
                    assert self.mirror.issuperset(hashes)
                    self.mirror.difference_update(hashes)
                case BlocksCleared():
                    self.mirror.clear()
        for block_hash in self.mirror:
            assert self.parent_of[block_hash] in (*ROOTS, *self.mirror)
        in_snapshot = [h for event in self.pool.snapshot() for h in event.hashes]
        assert sorted(in_snapshot) == sorted(self.mirror)


TestBlockPool = BlockPoolMachine.TestCase
TestBlockPool.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
