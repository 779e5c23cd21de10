"""The prefix index on hand-made events."""

import pytest

from protocol.ids import WorkerId
from protocol.records import BlocksCleared, BlocksRemoved, BlocksStored, KVEvent, KVEventBatch
from services.router.placement.index import IndexState, PrefixIndex


def chain(length: int, *, name: int = 0) -> list[bytes]:
    return [name.to_bytes(8, "little") + n.to_bytes(8, "little") for n in range(length)]


def stored(hashes: list[bytes]) -> BlocksStored:
    return BlocksStored(bytes(16), hashes)


def batch(sequence: int, *events: KVEvent, incarnation: int = 1) -> KVEventBatch:
    return KVEventBatch(incarnation, sequence, list(events))


def index_of(**blocks: list[bytes]) -> PrefixIndex:
    index = PrefixIndex()
    for worker_id, hashes in blocks.items():
        index.resync(worker_id, 1, sequence=0, hashes=set(hashes))
    return index


def test_match_counts_each_workers_blocks_up_to_its_first_gap() -> None:
    prompt = chain(10)
    index = index_of(
        whole=prompt,
        half=prompt[:5],
        holed=prompt[:3] + prompt[6:],
        headless=prompt[1:],
        stranger=chain(10, name=1),
    )
    assert index.match(prompt) == {"whole": 10, "half": 5, "holed": 3}
    assert index.match(prompt[:4]) == {"whole": 4, "half": 4, "holed": 3}
    assert index.match([]) == {}
    assert index.match(chain(3, name=2)) == {}


def test_events_move_the_match() -> None:
    prompt = chain(4)
    index = index_of(worker=[])
    assert index.apply("worker", batch(1, stored(prompt)))
    assert index.match(prompt) == {"worker": 4}
    assert index.apply("worker", batch(2, BlocksRemoved(prompt[2:])))
    assert index.match(prompt) == {"worker": 2}
    assert index.apply("worker", batch(3, BlocksCleared(), stored(prompt[:1])))
    assert index.match(prompt) == {"worker": 1}
    index.check_integrity()


def test_a_gap_degrades_until_the_next_resync() -> None:
    prompt = chain(2)
    index = index_of(worker=[])
    assert index.state("worker") is IndexState.EXACT
    assert not index.apply("worker", batch(2, stored(prompt)))
    assert index.state("worker") is IndexState.DEGRADED
    assert index.match(prompt) == {"worker": 2}, "what is known is used nevertheless"
    assert not index.apply("worker", batch(3)), "a gap isn't healed by what follows it"
    index.resync("worker", 1, sequence=3, hashes=set(prompt[:1]))
    assert index.state("worker") is IndexState.EXACT
    assert index.match(prompt) == {"worker": 1}
    assert index.apply("worker", batch(4))


def test_batches_that_the_snapshot_contains_change_nothing() -> None:
    prompt = chain(2)
    index = PrefixIndex()
    index.resync("worker", 1, sequence=5, hashes=set(prompt))
    assert index.apply("worker", batch(5, BlocksCleared()))
    assert index.match(prompt) == {"worker": 2}


def test_other_incarnations_and_unknown_workers_are_not_believed() -> None:
    prompt = chain(2)
    index = index_of(worker=[])
    assert not index.apply("worker", batch(1, stored(prompt), incarnation=2))
    assert not index.apply("nobody", batch(1, stored(prompt)))
    assert index.match(prompt) == {}
    assert index.state("nobody") is IndexState.DEGRADED
    index.resync("worker", 2, sequence=0, hashes=set())
    assert index.apply("worker", batch(1, stored(prompt), incarnation=2))


def test_degrade_is_for_outages() -> None:
    index = index_of(worker=chain(1))
    index.degrade("worker")
    index.degrade("nobody")
    assert index.state("worker") is IndexState.DEGRADED
    assert index.match(chain(1)) == {"worker": 1}


def test_a_removed_worker_leaves_nothing_and_its_place_is_reused() -> None:
    prompt = chain(3)
    index = index_of(a=prompt, b=prompt)
    index.remove_worker("a")
    index.remove_worker("nobody")
    assert index.match(prompt) == {"b": 3}
    assert index.num_blocks == 3
    index.resync("c", 1, sequence=0, hashes=set(prompt[:1]))
    assert index.match(prompt) == {"b": 3, "c": 1}
    index.check_integrity()


def test_memory_is_bounded() -> None:
    index = PrefixIndex(max_blocks=4)
    index.resync("a", 1, sequence=0, hashes=set(chain(3)))
    index.resync("b", 1, sequence=0, hashes=set(chain(3)))
    assert index.num_blocks == 4
    assert index.state("a") is IndexState.EXACT
    assert index.state("b") is IndexState.DEGRADED
    assert index.apply("b", batch(1, stored(chain(4)))), "a resync wouldn't bring more"
    assert index.num_blocks == 4
    index.check_integrity()


@pytest.mark.parametrize("num_workers", [1, 64, 200])
def test_many_workers(num_workers: int) -> None:
    prompt = chain(num_workers)
    names: list[WorkerId] = [f"worker-{n}" for n in range(num_workers)]
    index = index_of(**{name: prompt[: n + 1] for n, name in enumerate(names)})
    assert index.match(prompt) == {name: n + 1 for n, name in enumerate(names)}
