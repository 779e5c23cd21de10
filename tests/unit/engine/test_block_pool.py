"""The block pool's promises, one by one; the property machine holds them in all combinations."""

import pytest

from engine.block_pool import BlockCounts, BlockOwnershipError, BlockPool
from protocol.block_hash import BlockHash, hash_block, root_hash
from protocol.records import BlocksCleared, BlocksRemoved, BlocksStored

ROOT = root_hash("model")


def chain(*symbols: int, root: BlockHash = ROOT) -> list[BlockHash]:
    hashes: list[BlockHash] = []
    for symbol in symbols:
        hashes.append(hash_block(hashes[-1] if hashes else root, [symbol]))
    return hashes


def cached(pool: BlockPool, *symbols: int) -> list[int]:
    """Blocks of a finished sequence with this content."""
    hashes = chain(*symbols)
    matched = pool.match_prefix(hashes)
    fresh = pool.allocate(len(hashes) - len(matched))
    assert fresh is not None
    block_ids = matched + fresh
    pool.register(block_ids, hashes, root=ROOT)
    pool.free(block_ids)
    return block_ids


def test_fresh_blocks_come_as_one_run() -> None:
    pool = BlockPool(8, 16)
    assert pool.allocate(3) == [0, 1, 2]
    assert pool.allocate(2) == [3, 4]


def test_a_freed_run_is_handed_out_as_a_run() -> None:
    pool = BlockPool(8, 16)
    first, second = pool.allocate(4), pool.allocate(2)
    assert first is not None
    assert second is not None
    pool.free(first)
    assert pool.allocate(4) == first


def test_an_evicted_run_is_handed_out_as_a_run() -> None:
    pool = BlockPool(4, 16)
    block_ids = cached(pool, 1, 2, 3, 4)
    assert pool.allocate(4) == block_ids


def test_allocation_is_whole_or_not_at_all() -> None:
    pool = BlockPool(4, 16)
    cached(pool, 1, 2)
    held = pool.allocate(1)
    assert pool.allocate(4) is None
    assert pool.counts == BlockCounts(free=1, referenced=1, cached=2, quarantined=0, total=4)
    assert held is not None
    assert pool.allocate(0) == []


def test_leaves_are_evicted_before_their_predecessors() -> None:
    pool = BlockPool(4, 16)
    cached(pool, 1, 2, 3, 4)
    for remaining in (3, 2, 1, 0):
        assert pool.allocate(1) is not None
        assert pool.num_prefix_blocks(chain(1, 2, 3, 4)) == remaining


def test_the_least_recently_used_prefix_is_evicted_first() -> None:
    pool = BlockPool(4, 16)
    cached(pool, 1, 2)
    cached(pool, 3, 4)
    pool.free(pool.match_prefix(chain(1, 2)))
    pool.allocate(2)
    assert pool.num_prefix_blocks(chain(1, 2)) == 2
    assert pool.num_prefix_blocks(chain(3, 4)) == 0


def test_a_shared_prefix_outlives_its_branches() -> None:
    pool = BlockPool(4, 16)
    cached(pool, 1, 2)
    cached(pool, 1, 3)
    cached(pool, 1, 4)
    pool.allocate(3)
    assert pool.num_prefix_blocks(chain(1)) == 1
    assert [pool.num_prefix_blocks(chain(1, leaf)) for leaf in (2, 3, 4)] == [1, 1, 1]


def test_matching_pins_each_block_for_each_holder() -> None:
    pool = BlockPool(2, 16)
    block_ids = cached(pool, 1, 2)
    assert pool.match_prefix(chain(1, 2)) == block_ids
    assert pool.match_prefix(chain(1, 9)) == block_ids[:1]
    assert [pool.num_references(block) for block in block_ids] == [2, 1]
    assert pool.allocate(1) is None
    pool.free(block_ids)
    assert pool.allocate(1) == block_ids[1:]


def test_another_salt_never_matches() -> None:
    pool = BlockPool(2, 16)
    cached(pool, 1, 2)
    salted = chain(1, 2, root=root_hash("model", cache_salt="tenant"))
    assert pool.match_prefix(salted) == []


def test_equal_content_stays_private_to_the_second_holder() -> None:
    pool = BlockPool(4, 16)
    hashes = chain(1)
    first, second = pool.allocate(1), pool.allocate(1)
    assert first is not None
    assert second is not None
    pool.register(first, hashes, root=ROOT)
    pool.register(second, hashes, root=ROOT)
    pool.free(second)
    assert pool.counts.cached == 0
    assert pool.match_prefix(hashes) == first


def test_a_block_behind_someone_elses_duplicate_keeps_its_predecessor_in_the_cache() -> None:
    pool = BlockPool(5, 16)
    (ours,), theirs = pool.allocate(1) or [], pool.allocate(2)
    assert theirs is not None
    pool.register([ours], chain(1), root=ROOT)
    pool.register(theirs, chain(1, 2), root=ROOT)  # block 1 is ours, block 2 theirs
    pool.free([ours])
    cached(pool, 7)
    pool.free(theirs)
    # Freed earlier than the others, yet the predecessor of what was used last.
    assert pool.allocate(3) is not None
    assert pool.num_prefix_blocks(chain(7)) == 0
    assert pool.num_prefix_blocks(chain(1, 2)) == 2
    pool.check_integrity()


def test_a_holder_goes_private_when_its_predecessor_must_be_evicted() -> None:
    pool = BlockPool(3, 16)
    (ours,), theirs = pool.allocate(1) or [], pool.allocate(2)
    assert theirs is not None
    pool.register([ours], chain(1), root=ROOT)
    pool.register(theirs, chain(1, 2), root=ROOT)
    pool.free([ours])
    pool.drain_events()
    assert pool.allocate(1) == [ours]
    assert pool.num_prefix_blocks(chain(1, 2)) == 0
    assert pool.drain_events() == [BlocksRemoved([chain(1, 2)[1], chain(1)[0]])]
    pool.free(theirs)
    assert pool.counts == BlockCounts(free=2, referenced=1, cached=0, quarantined=0, total=3)


def test_nothing_is_registered_behind_a_missing_predecessor() -> None:
    pool = BlockPool(2, 16)
    block_ids = pool.allocate(2)
    assert block_ids is not None
    pool.register(block_ids, chain(1, 2)[:1], root=ROOT)
    pool.reset_cache()
    pool.register(block_ids, chain(1, 2), root=ROOT, first=1)
    assert pool.num_prefix_blocks(chain(1, 2)) == 0
    pool.free(block_ids)
    assert pool.counts.free == 2


def test_pinned_blocks_outlive_their_sequence() -> None:
    pool = BlockPool(2, 16)
    block_ids = pool.allocate(2)
    assert block_ids is not None
    with pool.pinned(block_ids[:1]):
        pool.free(block_ids)
        assert pool.counts == BlockCounts(free=1, referenced=1, cached=0, quarantined=0, total=2)
    assert pool.counts.free == 2


@pytest.mark.parametrize("operation", ["free", "pin", "quarantine", "release_quarantine"])
def test_whoever_holds_nothing_is_refused(operation: str) -> None:
    pool = BlockPool(2, 16)
    with pytest.raises(BlockOwnershipError):
        getattr(pool, operation)([1])


def test_freeing_twice_raises() -> None:
    pool = BlockPool(2, 16)
    block_ids = pool.allocate(1)
    assert block_ids is not None
    with pytest.raises(BlockOwnershipError, match="block 0"):
        pool.free([*block_ids, *block_ids])


def test_unheld_blocks_can_not_be_registered() -> None:
    pool = BlockPool(2, 16)
    with pytest.raises(BlockOwnershipError):
        pool.register([0], chain(1), root=ROOT)


def test_quarantined_blocks_are_out_of_reach_until_released() -> None:
    pool = BlockPool(2, 16)
    block_ids = pool.allocate(2)
    assert block_ids is not None
    pool.quarantine(block_ids)
    assert pool.counts == BlockCounts(free=0, referenced=0, cached=0, quarantined=2, total=2)
    assert pool.allocate(1) is None
    with pytest.raises(BlockOwnershipError):
        pool.free(block_ids)
    pool.release_quarantine(block_ids)
    with pytest.raises(BlockOwnershipError):
        pool.release_quarantine(block_ids)
    assert pool.allocate(2) == block_ids


def test_shared_or_registered_blocks_can_not_be_quarantined() -> None:
    pool = BlockPool(2, 16)
    block_ids = pool.allocate(2)
    assert block_ids is not None
    pool.pin(block_ids[:1])
    pool.register([block_ids[1]], chain(1), root=ROOT)
    for block_id in block_ids:
        with pytest.raises(BlockOwnershipError):
            pool.quarantine([block_id])


def test_events_tell_what_is_stored_and_removed_in_chain_order() -> None:
    pool = BlockPool(3, 16)
    cached(pool, 1, 2)
    a, b = chain(1, 2)
    assert pool.drain_events() == [BlocksStored(ROOT, [a, b])]
    cached(pool, 1, 3)
    c = chain(1, 3)[1]
    assert pool.drain_events() == [BlocksStored(a, [c])]
    pool.allocate(3)
    assert pool.drain_events() == [BlocksRemoved([b, c, a])]
    assert pool.drain_events() == []


def test_events_of_different_chains_stay_apart() -> None:
    pool = BlockPool(4, 16)
    cached(pool, 1, 2)
    cached(pool, 3)
    cached(pool, 1, 4)
    assert pool.drain_events() == [
        BlocksStored(ROOT, chain(1, 2)),
        BlocksStored(ROOT, chain(3)),
        BlocksStored(chain(1)[0], chain(1, 4)[1:]),
    ]


def test_reset_forgets_all_and_says_so_once() -> None:
    pool = BlockPool(4, 16)
    cached(pool, 1, 2)
    pool.reset_cache()
    assert pool.drain_events() == [BlocksCleared()]
    assert pool.counts.free == 4
    assert pool.match_prefix(chain(1, 2)) == []


def test_events_that_nobody_drains_shrink_to_the_present_content() -> None:
    pool = BlockPool(2, 16)
    for symbol in range(2000):
        cached(pool, symbol, symbol)
    assert pool.drain_events() == [
        BlocksCleared(),
        BlocksStored(ROOT, chain(1999, 1999)),
    ]
    cached(pool, 5)
    assert pool.drain_events()[-1] == BlocksStored(ROOT, chain(5))


def test_snapshot_lists_predecessors_first_with_one_event_a_chain() -> None:
    pool = BlockPool(8, 16)
    cached(pool, 1, 2, 3)
    cached(pool, 1, 2, 4, 5)
    known = {ROOT}
    hashes: list[BlockHash] = []
    for event in pool.snapshot():
        assert event.parent in known
        known.update(event.hashes)
        hashes += event.hashes
    assert sorted(hashes) == sorted({*chain(1, 2, 3), *chain(1, 2, 4, 5)})
    assert len(pool.snapshot()) == 2


def test_without_prefix_caching_nothing_is_kept() -> None:
    pool = BlockPool(2, 16, enable_prefix_caching=False)
    cached(pool, 1, 2)
    assert pool.counts == BlockCounts(free=2, referenced=0, cached=0, quarantined=0, total=2)
    assert pool.drain_events() == []


def test_integrity_check_finds_a_lost_block() -> None:
    pool = BlockPool(4, 16)
    pool._free.pop()
    with pytest.raises(BlockOwnershipError, match="don't add up to 4"):
        pool.check_integrity()


@pytest.mark.parametrize(("num_tokens", "num_blocks"), [(0, 0), (1, 1), (16, 1), (17, 2)])
def test_blocks_for_tokens(num_tokens: int, num_blocks: int) -> None:
    assert BlockPool(4, 16).num_blocks_for(num_tokens) == num_blocks
