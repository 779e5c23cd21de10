"""The prefix index against the plainest model of it: a set of hashes for each worker."""

from itertools import takewhile

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from protocol.records import BlocksCleared, BlocksRemoved, BlocksStored, KVEvent, KVEventBatch
from services.router.placement.index import IndexState, PrefixIndex

WORKERS = st.sampled_from(["a", "b", "c"])
HASHES = st.lists(st.integers(0, 11).map(lambda n: n.to_bytes(16, "little")), max_size=8)
EVENTS = st.lists(
    st.one_of(
        HASHES.map(lambda hashes: BlocksStored(bytes(16), hashes)),
        HASHES.map(BlocksRemoved),
        st.just(BlocksCleared()),
    ),
    max_size=4,
)


class IndexMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.index = PrefixIndex()
        self.blocks: dict[str, set[bytes]] = {}
        self.incarnations: dict[str, int] = {}
        self.sequences: dict[str, int] = {}
        self.exact: dict[str, bool] = {}

    @rule(worker=WORKERS, hashes=HASHES, restarts=st.booleans(), sequence=st.integers(0, 5))
    def resync(self, worker: str, hashes: list[bytes], *, restarts: bool, sequence: int) -> None:
        self.incarnations[worker] = self.incarnations.get(worker, 0) + restarts
        self.index.resync(worker, self.incarnations[worker], sequence=sequence, hashes=set(hashes))
        self.blocks[worker] = set(hashes)
        self.sequences[worker] = sequence
        self.exact[worker] = True

    @rule(worker=WORKERS, events=EVENTS, skipped=st.integers(0, 2), is_stale=st.booleans())
    def events(self, worker: str, events: list[KVEvent], *, skipped: int, is_stale: bool) -> None:
        known = worker in self.blocks
        incarnation = self.incarnations.get(worker, 0) - is_stale
        sequence = self.sequences.get(worker, 0) + 1 + skipped
        accepted = self.index.apply(worker, KVEventBatch(incarnation, sequence, events))
        if not known or is_stale:
            assert not accepted
            return
        self.sequences[worker] = sequence
        self.exact[worker] &= skipped == 0
        assert accepted == self.exact[worker]
        for event in events:
            match event:
                case BlocksStored(_, hashes):
                    self.blocks[worker].update(hashes)
                case BlocksRemoved(hashes):
                    self.blocks[worker].difference_update(hashes)
                case BlocksCleared():
                    self.blocks[worker].clear()

    @rule(worker=WORKERS)
    def remove(self, worker: str) -> None:
        self.index.remove_worker(worker)
        self.blocks.pop(worker, None)

    @rule(prompt=HASHES)
    def match(self, prompt: list[bytes]) -> None:
        expected = {
            worker: len(list(takewhile(blocks.__contains__, prompt)))
            for worker, blocks in self.blocks.items()
        }
        assert self.index.match(prompt) == {w: n for w, n in expected.items() if n}

    @invariant()
    def states(self) -> None:
        self.index.check_integrity()
        assert self.index.num_blocks == sum(len(blocks) for blocks in self.blocks.values())
        for worker in self.blocks:
            assert (self.index.state(worker) is IndexState.EXACT) == self.exact[worker]


TestIndexMachine = IndexMachine.TestCase
TestIndexMachine.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
