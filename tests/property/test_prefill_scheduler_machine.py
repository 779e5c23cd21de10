"""Random prompts, chunks, releases and aborts, with simulated KV memory.

As in the decode machine, a token's "KV" is a hash of all tokens up to it, so whoever reads a
block that was shared or reused wrongly finds a wrong value. Retained sequences are read by their
transfers until they're released.
"""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from engine.block_pool import BlockPool
from engine.phase import Phase
from engine.scheduler.config import SchedulerConfig
from engine.scheduler.prefill import PrefillScheduler
from engine.sequence import Sequence
from protocol.block_hash import root_hash
from protocol.ids import RequestKey
from protocol.request import Request
from protocol.sampling import SamplingParams

BLOCK_SIZE = 2
NUM_BLOCKS = 12
MAX_NUM_SEQS = 3
MAX_BATCHED_TOKENS = 5


def kv_values(root: bytes, token_ids: list[int]) -> list[int]:
    """The "KV" of each token: a hash of everything up to it."""
    values: list[int] = []
    value = int.from_bytes(root)
    for token_id in token_ids:
        value = hash((value, token_id))
        values.append(value)
    return values


class PrefillMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(NUM_BLOCKS, BLOCK_SIZE)
        self.scheduler = PrefillScheduler(
            self.pool,
            SchedulerConfig(
                max_num_seqs=MAX_NUM_SEQS,
                max_num_batched_tokens=MAX_BATCHED_TOKENS,
                max_model_len=1000,
            ),
        )
        self.memory: dict[tuple[int, int], int] = {}
        self.computing: list[Sequence] = []
        self.retained: list[Sequence] = []
        self.num_requests = 0

    @rule(
        prompt=st.lists(st.integers(0, 1), min_size=1, max_size=NUM_BLOCKS * BLOCK_SIZE - 1),
        priority=st.integers(0, 1),
        salt=st.sampled_from([None, "tenant"]),
    )
    def add(self, prompt, priority, salt):
        self.num_requests += 1
        request = Request(
            key=RequestKey(f"r{self.num_requests}", 0),
            token_ids=prompt,
            num_prompt_tokens=len(prompt),
            sampling=SamplingParams(max_tokens=4),
            priority=priority,
        )
        sequence = Sequence(
            request, root_hash("m", cache_salt=salt), arrival_s=float(self.num_requests)
        )
        self.scheduler.add(sequence)
        self.computing.append(sequence)

    @rule()
    def step(self):
        self.run_step()

    def run_step(self) -> bool:
        plan = self.scheduler.schedule()
        assert plan.num_tokens <= MAX_BATCHED_TOKENS
        assert not plan.preempted
        for item in plan.scheduled:
            sequence = item.sequence
            assert 1 <= item.num_new_tokens <= sequence.num_uncomputed_tokens
            start = sequence.num_computed_tokens
            values = kv_values(sequence.root, sequence.token_ids)
            for position in range(start, start + item.num_new_tokens):
                block = sequence.block_ids[position // BLOCK_SIZE]
                self.memory[block, position % BLOCK_SIZE] = values[position]
        updates = self.scheduler.commit(plan, [[1] for item in plan.scheduled if item.samples])
        assert len(updates) == sum(item.samples for item in plan.scheduled)
        for update in updates:
            assert update.new_token_ids == [1]
            assert update.sequence.phase is Phase.RETAINED
            self.computing.remove(update.sequence)
            self.retained.append(update.sequence)
        return bool(plan.scheduled)

    @precondition(lambda self: self.retained)
    @rule(data=st.data())
    def release(self, data):
        sequence = data.draw(st.sampled_from(self.retained))
        self.retained.remove(sequence)
        self.scheduler.release(sequence)

    @precondition(lambda self: self.retained or self.computing)
    @rule(data=st.data())
    def abort(self, data):
        sequence = data.draw(st.sampled_from(self.retained + self.computing))
        assert self.scheduler.abort(sequence.key) is sequence
        assert self.scheduler.abort(sequence.key) is None
        self.scheduler.release(sequence)  # lost the race: nothing happens
        owner = self.retained if sequence in self.retained else self.computing
        owner.remove(sequence)

    @invariant()
    def computed_tokens_keep_their_kv(self):
        for sequence in self.retained + self.computing:
            values = kv_values(sequence.root, sequence.token_ids)
            for position in range(sequence.num_computed_tokens):
                block = sequence.block_ids[position // BLOCK_SIZE]
                assert self.memory[block, position % BLOCK_SIZE] == values[position]

    @invariant()
    def blocks_and_counts_add_up(self):
        self.pool.check_integrity()
        held = [b for s in self.retained + self.computing for b in s.block_ids]
        assert self.pool.counts.referenced == len(set(held))
        assert self.scheduler.num_retained == len(self.retained)
        assert self.scheduler.num_waiting + self.scheduler.num_running == len(self.computing)
        assert self.scheduler.num_running <= MAX_NUM_SEQS
        running = [s for s in self.computing if s.phase is Phase.PREFILLING]
        for sequence in running:
            assert len(sequence.block_ids) * BLOCK_SIZE >= sequence.num_tokens

    def teardown(self):
        while self.computing or self.retained:
            for sequence in self.retained:
                self.scheduler.release(sequence)
            self.retained.clear()
            progressed = self.run_step()
            assert progressed or not self.computing
        self.blocks_and_counts_add_up()
        assert self.pool.counts.free + self.pool.counts.cached == NUM_BLOCKS
        assert self.scheduler.queued_tokens == 0


TestPrefillScheduler = PrefillMachine.TestCase
TestPrefillScheduler.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
