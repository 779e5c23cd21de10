"""Random prompts, chunks, releases and aborts, with simulated KV memory.

As in the decode machine, a token's "KV" is a hash of all tokens up to it, so whoever reads a
block that was shared or reused wrongly finds a wrong value. Retained sequences are read by their
transfers until they're released.

Steps may run one ahead: what such a step writes, it writes when it's launched and once more just
before it's committed, so that a block it still writes to can't be given away in between.
"""

from dataclasses import dataclass

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from engine.block_pool import BlockPool
from engine.phase import Phase
from engine.scheduler.config import SchedulerConfig
from engine.scheduler.plan import StepPlan
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


@dataclass(eq=False)
class Step:
    """A launched step; per item the KV of its tokens, and from where to where it writes them."""

    plan: StepPlan
    written: list[tuple[list[int], int, int]]


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
        self.running: Step | None = None
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

    @rule(is_ahead=st.booleans())
    def step(self, is_ahead):
        self.run_step(is_ahead=is_ahead)

    @rule(are_ahead=st.lists(st.booleans(), max_size=6))
    def some_steps(self, are_ahead):
        for is_ahead in are_ahead:
            self.run_step(is_ahead=is_ahead)

    def run_step(self, *, is_ahead) -> bool:
        """Finishes the step that runs ahead, or a new one; whether there was one."""
        step = self.running or self.launch(self.scheduler.schedule())
        self.running = None
        if is_ahead and step.plan.scheduled:
            ahead = self.scheduler.schedule_ahead(step.plan)
            self.running = None if ahead is None else self.launch(ahead)
        self.write_step(step)
        plan = step.plan
        live = [i for i in plan.scheduled if i.samples and i.sequence in self.computing]
        updates = self.scheduler.commit(plan, [[1] for item in plan.scheduled if item.samples])
        assert [update.sequence for update in updates] == [item.sequence for item in live]
        for update in updates:
            assert update.new_token_ids == [1]
            assert update.sequence.phase is Phase.RETAINED
            self.computing.remove(update.sequence)
            self.retained.append(update.sequence)
        for block in self.pool._free:
            self.memory.update(((block, offset), -1) for offset in range(BLOCK_SIZE))
        return bool(plan.scheduled)

    def launch(self, plan) -> Step:
        assert plan.num_tokens <= MAX_BATCHED_TOKENS
        assert not plan.preempted
        step = Step(plan, [])
        for item in plan.scheduled:
            sequence = item.sequence
            stop = item.start + item.num_new_tokens
            assert item.start < stop <= sequence.num_tokens
            assert item.samples == (stop == sequence.num_tokens)
            step.written.append((kv_values(sequence.root, sequence.token_ids), item.start, stop))
        self.write_step(step)
        return step

    def write_step(self, step) -> None:
        for item, (values, start, stop) in zip(step.plan.scheduled, step.written, strict=True):
            for position in range(start, stop):
                block = item.sequence.block_ids[position // BLOCK_SIZE]
                self.memory[block, position % BLOCK_SIZE] = values[position]

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
        in_step = [item.sequence for item in self.running.plan.scheduled] if self.running else []
        ended = [s for s in in_step if s.phase is Phase.FINISHED]
        held = [b for s in self.retained + self.computing + ended for b in s.block_ids]
        assert self.pool.counts.referenced == len(set(held))
        assert self.scheduler.num_retained == len(self.retained)
        assert self.scheduler.num_waiting + self.scheduler.num_running == len(self.computing)
        assert self.scheduler.num_running <= MAX_NUM_SEQS
        running = [s for s in self.computing if s.phase is Phase.PREFILLING]
        for sequence in running:
            assert len(sequence.block_ids) * BLOCK_SIZE >= sequence.num_tokens

    def teardown(self):
        while self.computing or self.retained or self.running:
            for sequence in self.retained:
                self.scheduler.release(sequence)
            self.retained.clear()
            progressed = self.run_step(is_ahead=len(self.computing) % 2 == 0)
            assert progressed or not self.computing
        self.blocks_and_counts_add_up()
        assert self.pool.counts.free + self.pool.counts.cached == NUM_BLOCKS
        assert self.scheduler.queued_tokens == 0


TestPrefillScheduler = PrefillMachine.TestCase
TestPrefillScheduler.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
