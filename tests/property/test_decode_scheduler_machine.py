"""Random requests, transfers, cancellations and aborts over a small pool with simulated KV memory.

Every token's "KV" is a hash of all tokens up to it. Steps read what they attend to and write what
they compute, senders write to reserved blocks until they confirm that they stopped: so a block
that is shared, evicted, reassigned or reused wrongly shows as a wrong value. Tokens follow from
the KV, so a preempted sequence has to continue as if nothing had happened.
Steps may run one ahead: what such a step writes, it writes when it's launched and once more just
before it's committed, so that a block it still writes to can't be given away in between.
Tokens may be forced: a step then yields some of those that would follow its own, too.
"""

import random
from dataclasses import dataclass, field

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from engine.block_pool import BlockPool
from engine.phase import Phase, PhaseError
from engine.scheduler.config import SchedulerConfig
from engine.scheduler.decode import DecodeScheduler
from engine.scheduler.plan import StepPlan
from engine.scheduler.reservations import Reservation
from engine.scheduler.tiles import StepTiles
from engine.sequence import Sequence
from protocol.block_hash import root_hash
from protocol.errors import ContextLengthError
from protocol.ids import RequestKey
from protocol.request import Request
from protocol.sampling import SamplingParams

BLOCK_SIZE = 2
NUM_BLOCKS = 10
MAX_MODEL_LEN = 18
MAX_NUM_SEQS = 4
MAX_BATCHED_TOKENS = 6
MAX_MIXED_TOKENS = 3
EOS = 3

jumps = st.lists(st.integers(0, 3), min_size=MAX_NUM_SEQS, max_size=MAX_NUM_SEQS)
prompts = st.lists(st.integers(0, 1), min_size=1, max_size=15)


def kv_values(root: bytes, token_ids: list[int]) -> list[int]:
    """The "KV" of each token: a hash of everything up to it."""
    values: list[int] = []
    value = int.from_bytes(root)
    for token_id in token_ids:
        value = hash((value, token_id))
        values.append(value)
    return values


def next_token(value: int) -> int:
    return random.Random(value).choice([0, 0, 1, 1, 2, EOS])


def generate(sequence: Sequence) -> list[int]:
    """What the request's tokens are when nothing disturbs it."""
    token_ids = list(sequence.request.token_ids)
    sampling = sequence.request.sampling
    while True:
        token_ids.append(next_token(kv_values(sequence.root, token_ids)[-1]))
        num_output = len(token_ids) - sequence.request.num_prompt_tokens
        stops = token_ids[-1] == EOS and num_output >= sampling.min_tokens
        if stops or num_output >= sampling.max_tokens or len(token_ids) >= MAX_MODEL_LEN:
            return token_ids


@dataclass(eq=False)
class Transfer:
    reservation: Reservation
    stopping: bool = False


@dataclass(eq=False)
class Step:
    """A launched step: per item the KV of its tokens, and from where to where it writes them."""

    plan: StepPlan
    written: list[tuple[list[int], int, int]] = field(default_factory=list)
    sampled: dict[Sequence, int] = field(default_factory=dict)

    def samples(self) -> list[int]:
        """Of the sequences that don't know their next token by now."""
        return [self.sampled[item.sequence] for item in self.plan.scheduled if item.samples]


class DecodeMachine(RuleBasedStateMachine):
    num_swap_blocks = 0

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(NUM_BLOCKS, BLOCK_SIZE)
        self.scheduler = DecodeScheduler(
            self.pool,
            SchedulerConfig(
                max_num_seqs=MAX_NUM_SEQS,
                max_num_batched_tokens=MAX_BATCHED_TOKENS,
                max_num_mixed_tokens=MAX_MIXED_TOKENS,
                tiles=StepTiles(4, (0, 6)),
                max_model_len=MAX_MODEL_LEN,
                eos_token_ids=frozenset({EOS}),
                num_swap_blocks=self.num_swap_blocks,
            ),
        )
        self.memory: dict[tuple[int, int], int] = {}
        self.host_memory: dict[tuple[int, int], int | None] = {}
        self.live: dict[RequestKey, Sequence] = {}
        self.transfers: list[Transfer] = []
        self.refused: Sequence | None = None
        self.running: Step | None = None
        self.num_requests = 0
        self.now_s = 0

    def new_sequence(self, prompt, max_tokens, min_tokens, priority, salt, num_output=0):
        self.num_requests += 1
        self.now_s += 1
        request = Request(
            key=RequestKey(f"r{self.num_requests}", 0),
            token_ids=prompt,
            num_prompt_tokens=len(prompt) - min(num_output, len(prompt) - 1),
            sampling=SamplingParams(
                max_tokens=max_tokens + num_output, min_tokens=min(min_tokens, max_tokens)
            ),
            priority=priority,
        )
        return Sequence(request, root_hash("m", cache_salt=salt), float(self.now_s // 2))

    sequences = st.fixed_dictionaries(
        {
            "prompt": prompts,
            "max_tokens": st.integers(1, 8),
            "min_tokens": st.integers(0, 3),
            "priority": st.integers(0, 1),
            "salt": st.sampled_from([None, "tenant"]),
            "num_output": st.integers(0, 2),
        }
    )

    @rule(kwargs=sequences)
    def add(self, kwargs):
        sequence = self.new_sequence(**kwargs)
        self.scheduler.add(sequence)
        self.live[sequence.key] = sequence

    @rule()
    def add_too_long(self):
        sequence = self.new_sequence([0] * MAX_MODEL_LEN, 1, 0, 0, None)
        with pytest.raises(ContextLengthError):
            self.scheduler.add(sequence)

    @rule(kwargs=sequences)
    def reserve(self, kwargs):
        sequence = self.refused or self.new_sequence(**kwargs)
        available = self.pool.num_available_blocks
        reservation = self.scheduler.try_reserve(sequence)
        if reservation is None:
            self.refused = sequence
            assert self.pool.num_available_blocks == available
            return
        self.refused = None
        assert reservation.block_ids
        self.live[sequence.key] = sequence
        self.transfers.append(Transfer(reservation))

    @precondition(lambda self: self.transfers)
    @rule(data=st.data())
    def write_late(self, data):
        """A sender writes anything; only its own, still reserved blocks may show it."""
        transfer = data.draw(st.sampled_from(self.transfers))
        for block in transfer.reservation.block_ids:
            for offset in range(BLOCK_SIZE):
                self.memory[block, offset] = -1

    @precondition(lambda self: any(not t.stopping for t in self.transfers))
    @rule(data=st.data(), num_forced=st.integers(0, 7))
    def arrive(self, data, num_forced):
        running = [t for t in self.transfers if not t.stopping]
        transfer = data.draw(st.sampled_from(running))
        reservation, sequence = transfer.reservation, transfer.reservation.sequence
        self.transfers.remove(transfer)
        values = kv_values(sequence.root, sequence.token_ids)
        self.write(
            sequence, values, reservation.num_cached_blocks * BLOCK_SIZE, reservation.num_tokens
        )
        stop = sequence.num_tokens + 1 + num_forced
        sequence.token_ids[:] = generate(sequence)[:stop]
        if sequence.token_ids == generate(sequence):  # ended by its first token
            assert self.scheduler.abort(sequence.key) is sequence
            self.scheduler.confirm_stopped(reservation)
            del self.live[sequence.key]
            return
        self.scheduler.admit(sequence)
        with pytest.raises(PhaseError):
            self.scheduler.cancel_reservation(reservation)

    @precondition(lambda self: any(not t.stopping for t in self.transfers))
    @rule(data=st.data(), by_abort=st.booleans())
    def cancel(self, data, by_abort):
        transfer = data.draw(st.sampled_from([t for t in self.transfers if not t.stopping]))
        key = transfer.reservation.sequence.key
        if by_abort:
            assert self.scheduler.abort(key) is transfer.reservation.sequence
        else:
            self.scheduler.cancel_reservation(transfer.reservation)
        assert transfer.reservation.sequence.phase is Phase.STOPPING
        transfer.stopping = True
        del self.live[key]

    @precondition(lambda self: any(t.stopping for t in self.transfers))
    @rule(data=st.data())
    def stop(self, data):
        transfer = data.draw(st.sampled_from([t for t in self.transfers if t.stopping]))
        self.scheduler.confirm_stopped(transfer.reservation)
        self.transfers.remove(transfer)
        with pytest.raises(PhaseError):
            self.scheduler.confirm_stopped(transfer.reservation)

    @precondition(lambda self: any(s.phase is not Phase.RESERVED for s in self.live.values()))
    @rule(data=st.data())
    def abort(self, data):
        keys = [key for key, s in self.live.items() if s.phase is not Phase.RESERVED]
        key = data.draw(st.sampled_from(keys))
        assert self.scheduler.abort(key) is self.live.pop(key)
        assert self.scheduler.abort(key) is None

    @rule()
    def reset_cache(self):
        self.pool.reset_cache()

    @rule(is_ahead=st.booleans())
    def step(self, is_ahead):
        self.run_step(is_ahead=is_ahead)

    @rule(are_ahead=st.lists(st.booleans(), max_size=8))
    def some_steps(self, are_ahead):
        for is_ahead in are_ahead:
            self.run_step(is_ahead=is_ahead)

    @rule(kwargs=sequences, steps=st.lists(jumps, min_size=1, max_size=8), is_ahead=st.booleans())
    def some_jumps(self, kwargs, steps, is_ahead):
        """Of sequences that have the worker to themselves, one new among them."""
        self.add({**kwargs, "max_tokens": 8})
        for _ in range(2 * MAX_MODEL_LEN):
            if self.scheduler.queued_tokens:
                self.run_step(is_ahead=False)
        for nums_forced in steps:
            self.run_step(is_ahead=is_ahead, nums_forced=nums_forced)

    @rule(is_ahead=st.booleans(), data=st.data())
    def step_with_abort(self, is_ahead, data):
        self.run_step(is_ahead=is_ahead, aborted_meanwhile=data)

    def run_step(self, *, is_ahead, aborted_meanwhile=None, nums_forced=()) -> bool:
        """Finishes the step that runs ahead, or a new one; whether there was one."""
        step = self.running or self.launch(self.scheduler.schedule(), None)
        self.running = None
        if is_ahead and step.plan.scheduled:
            ahead = self.scheduler.schedule_ahead(step.plan)
            self.running = None if ahead is None else self.launch(ahead, step)
        self.write_step(step)
        in_step = [item.sequence for item in step.plan.scheduled if self.is_live(item.sequence)]
        if aborted_meanwhile is not None and in_step:
            victim = aborted_meanwhile.draw(st.sampled_from(in_step))
            assert self.scheduler.abort(victim.key) is victim
            del self.live[victim.key]
        for update in self.scheduler.commit(step.plan, self.with_forced(step, nums_forced)):
            sequence = update.sequence
            expected = generate(sequence)
            assert expected[: sequence.num_tokens] == sequence.token_ids
            assert (update.finish_reason is not None) == (sequence.token_ids == expected)
            if update.finish_reason is not None:
                assert self.live.pop(sequence.key) is sequence
                assert bool(sequence.block_ids) == (sequence in self.running_sequences)
        for block in self.pool._free:
            self.memory.update(((block, offset), -1) for offset in range(BLOCK_SIZE))
        return bool(step.plan.scheduled)

    def with_forced(self, step, nums_forced) -> list[list[int]]:
        """What each sequence samples, with some tokens behind that aren't to be sampled."""
        tokens = [[token] for token in step.samples()]
        in_step = (item.sequence for item in step.plan.scheduled if item.samples)
        for sequence, own, num_forced in zip(in_step, tokens, nums_forced, strict=False):
            if self.is_live(sequence):
                start = sequence.num_tokens + 1
                own += generate(sequence)[start : start + num_forced]
        return tokens

    def launch(self, plan, before) -> Step:
        """Runs a plan behind `before`, whose tokens may not be committed yet."""
        assert plan.num_tokens <= MAX_BATCHED_TOKENS
        assert self.scheduler.num_running <= MAX_NUM_SEQS
        scheduled = [item.sequence for item in plan.scheduled]
        assert len(set(scheduled)) == len(scheduled)
        assert set(scheduled).isdisjoint(plan.preempted)
        self.copy(plan.copies)
        step = Step(plan)
        for item in plan.scheduled:
            token_ids = list(item.sequence.token_ids)
            if item.source is not None:
                token_ids.append(before.samples()[item.source])
            num_left = len(token_ids) - item.start
            assert 1 <= item.num_new_tokens <= num_left
            assert item.samples == (item.num_new_tokens == num_left)
            values = kv_values(item.sequence.root, token_ids)
            step.written.append((values, item.start, item.start + item.num_new_tokens))
        self.write_step(step)
        for item, (values, _, stop) in zip(plan.scheduled, step.written, strict=True):
            if item.samples:
                self.check_memory(item.sequence, values, stop)
                step.sampled[item.sequence] = next_token(values[-1])
        return step

    def write_step(self, step) -> None:
        for item, written in zip(step.plan.scheduled, step.written, strict=True):
            self.write(item.sequence, *written)

    def is_live(self, sequence) -> bool:
        return self.live.get(sequence.key) is sequence

    @property
    def running_sequences(self) -> list[Sequence]:
        return [item.sequence for item in self.running.plan.scheduled] if self.running else []

    def copy(self, copies) -> None:
        for offset in range(BLOCK_SIZE):
            for block, host_block in copies.out:
                self.host_memory[host_block, offset] = self.memory.get((block, offset))
            for block, host_block in copies.back:
                self.memory[block, offset] = self.host_memory[host_block, offset]

    def write(self, sequence, values, start, stop) -> None:
        for position in range(start, stop):
            block = sequence.block_ids[position // BLOCK_SIZE]
            self.memory[block, position % BLOCK_SIZE] = values[position]

    def check_memory(self, sequence, values, stop) -> None:
        for position in range(stop):
            block = sequence.block_ids[position // BLOCK_SIZE]
            assert self.memory[block, position % BLOCK_SIZE] == values[position]

    @invariant()
    def blocks_add_up(self):
        self.pool.check_integrity()
        in_quarantine = [b for t in self.transfers if t.stopping for b in t.reservation.block_ids]
        assert self.pool.counts.quarantined == len(in_quarantine)
        held: dict[int, int] = {}
        ended = (each for each in self.running_sequences if not self.is_live(each))
        for sequence in (*self.live.values(), *ended):
            for block in sequence.block_ids:
                held[block] = held.get(block, 0) + 1
        for block in range(NUM_BLOCKS):
            assert self.pool.num_references(block) == held.get(block, 0)

    @invariant()
    def host_blocks_are_those_of_swapped_sequences(self):
        swapped = [s for s in self.live.values() if s.phase is Phase.SWAPPED]
        num_held = sum(self.pool.num_blocks_for(s.num_computed_tokens) for s in swapped)
        space = self.scheduler._admission.swap
        assert self.scheduler.num_swapped == len(swapped)
        assert space.num_free_blocks + num_held == self.num_swap_blocks
        assert all(not s.block_ids and s.num_computed_tokens for s in swapped)
        assert not space.drain()

    @invariant()
    def counts_tell_the_truth(self):
        assert self.scheduler.num_reserved == sum(not t.stopping for t in self.transfers)
        assert self.scheduler.num_stopping == sum(t.stopping for t in self.transfers)
        assert len(self.live) == (
            self.scheduler.num_waiting + self.scheduler.num_running + self.scheduler.num_reserved
        )

    def teardown(self):
        for transfer in self.transfers:
            if not transfer.stopping:
                self.scheduler.cancel_reservation(transfer.reservation)
                del self.live[transfer.reservation.sequence.key]
            self.scheduler.confirm_stopped(transfer.reservation)
        self.transfers.clear()
        # With nobody else's blocks in the way, every step makes progress until all are done.
        while self.live or self.running:
            assert self.run_step(is_ahead=len(self.live) % 2 == 0)
        self.blocks_add_up()
        assert self.pool.counts.free + self.pool.counts.cached == NUM_BLOCKS
        assert self.scheduler.queued_tokens == 0


class SwappingMachine(DecodeMachine):
    """With room in host memory for one or two of the sequences that are preempted."""

    num_swap_blocks = 8


TestDecodeScheduler = DecodeMachine.TestCase
TestDecodeScheduler.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
TestSwappingScheduler = SwappingMachine.TestCase
TestSwappingScheduler.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
