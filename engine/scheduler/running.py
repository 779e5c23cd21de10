"""The sequences that decode, and those that arrived for it: who joins, what a step computes of
each, and whose blocks it takes when there are none left."""

from dataclasses import dataclass

from engine.block_pool import BlockPool
from engine.phase import Phase, PhaseEvent
from engine.scheduler.admission import Admission
from engine.scheduler.ahead import in_flight_tokens
from engine.scheduler.plan import ScheduledSequence, StepPlan
from engine.scheduler.progress import StopRules
from engine.scheduler.prompts import PromptQueue
from engine.scheduler.queue import RankedQueue, running_rank
from engine.sequence import Sequence


@dataclass(slots=True)
class DecodeStats:
    """Counts since the start."""

    num_preemptions: int = 0


class DecodeTokens:
    """One step's tokens for `num_sequences` that decode: each gets one, and the first who want
    more, because several of their tokens are known, get what is left."""

    def __init__(self, budget: int, num_sequences: int) -> None:
        self._num_spare = max(0, budget - num_sequences)

    def give(self, num_wanted: int) -> int:
        """One at least."""
        num_given = min(num_wanted, 1 + self._num_spare)
        self._num_spare -= num_given - 1
        return num_given


def grow(pool: BlockPool, sequence: Sequence, num_tokens: int) -> bool:
    """Gives it the blocks that `num_tokens` tokens need; false, with nothing taken, if there aren't
    as many."""
    num_held = len(sequence.block_ids)
    if num_held * pool.block_size >= num_tokens:
        return True
    block_ids = pool.allocate(pool.num_blocks_for(num_tokens) - num_held)
    if block_ids is None:
        return False
    sequence.block_ids += block_ids
    return True


def chunks_last(scheduled: list[ScheduledSequence]) -> list[ScheduledSequence]:
    """Rows of one token stay together, in order: attention has a faster way for them."""
    return sorted(scheduled, key=_is_chunk)


def _is_chunk(item: ScheduledSequence) -> bool:
    return item.num_new_tokens > 1


class RunningBatch:
    """Decoding and arrived sequences, by rank; local prompts compete with them for blocks."""

    def __init__(
        self,
        pool: BlockPool,
        admission: Admission,
        prompts: PromptQueue,
        stop_rules: StopRules,
        *,
        max_num_seqs: int,
    ) -> None:
        self.decoding = RankedQueue(running_rank)
        self.arrived = RankedQueue(running_rank)
        self.stats = DecodeStats()
        self._pool = pool
        self._admission = admission
        self._prompts = prompts
        self._stop_rules = stop_rules
        self._max_num_seqs = max_num_seqs

    @property
    def num_running(self) -> int:
        return len(self.decoding) + len(self._prompts.active)

    @property
    def has_place(self) -> bool:
        return self.num_running < self._max_num_seqs

    def join_arrived(self) -> None:
        """As many as there are places."""
        while self.arrived and self.has_place:
            sequence = self.arrived[0]
            self.arrived.remove(sequence)
            sequence.advance(PhaseEvent.JOIN)
            self.decoding.insert(sequence)

    def plan(self, budget: int, preempted: list[Sequence]) -> list[ScheduledSequence]:
        """The step's chunks, up to `budget` tokens; whoever loses its blocks to them is added to
        `preempted`."""
        scheduled: list[ScheduledSequence] = []
        tokens = DecodeTokens(budget, len(self.decoding))
        # Preemption takes from the end of the ranks, so it never hits what is scheduled already.
        for sequence in tuple(self.decoding):
            if preempted and sequence.phase is not Phase.DECODING:
                continue
            num_known = len(sequence.token_ids) - sequence.num_computed_tokens
            num_new = 1 if num_known == 1 else tokens.give(num_known)
            if self._make_room(sequence, sequence.num_computed_tokens + num_new, preempted):
                scheduled.append(ScheduledSequence(sequence, num_new, num_new == num_known))
        return chunks_last(scheduled)

    def plan_ahead(self, budget: int, running: StepPlan) -> list[ScheduledSequence] | None:
        """The chunks of the step behind `running`, whose tokens aren't known yet: of each sequence
        the known ones, or else the one being sampled, unless that ends it for its length. Prompts
        that `running` is through with decode in it.

        None if blocks run out: what others have got by then, they keep.
        """
        in_flight = in_flight_tokens(running)
        sampling = (item.sequence for item in running.scheduled if item.samples)
        sources = {sequence: place for place, sequence in enumerate(sampling)}
        caught_up = [sequence for sequence in sources if sequence.phase is Phase.PREFILLING]
        tokens = DecodeTokens(budget, len(self.decoding) + len(caught_up))
        scheduled: list[ScheduledSequence] = []
        for sequence in (*self.decoding, *caught_up):
            source = sources.get(sequence)
            num_tokens = sequence.num_tokens + (source is not None)
            if source is not None and num_tokens >= self._stop_rules.max_tokens(sequence):
                continue
            num_in_flight = in_flight.get(sequence, 0)
            start = sequence.num_computed_tokens + num_in_flight
            num_new = tokens.give(num_tokens - start)
            if not grow(self._pool, sequence, start + num_new):
                return None
            samples = start + num_new == num_tokens
            scheduled.append(
                ScheduledSequence(sequence, num_new, samples, source, num_in_flight=num_in_flight)
            )
        return chunks_last(scheduled)

    def take_out(self, sequence: Sequence) -> None:
        """Removes it from the queue where its phase says it is, be it a prompt."""
        match sequence.phase:
            case Phase.DECODING:
                self.decoding.remove(sequence)
            case Phase.ARRIVED:
                self.arrived.remove(sequence)
            case _:
                self._prompts.remove(sequence)

    def _make_room(self, sequence: Sequence, num_tokens: int, preempted: list[Sequence]) -> bool:
        """Blocks for `num_tokens` tokens, taken from whoever ranks last if need be.

        False if that is the sequence itself: it's preempted then, or, where it's the only one
        that holds blocks, pauses until blocks under transfer, pinned or in quarantine come back.
        """
        while not grow(self._pool, sequence, num_tokens):
            victim = self._last_holder()
            if victim is sequence and self._num_holders() == 1:
                return False
            self._preempt(victim)
            preempted.append(victim)
            if victim is sequence:
                return False
        return True

    def _num_holders(self) -> int:
        return len(self.decoding) + len(self._prompts.active) + len(self.arrived)

    def _last_holder(self) -> Sequence:
        queues = (self.decoding, self._prompts.active, self.arrived)
        return max((queue[-1] for queue in queues if queue), key=running_rank)

    def _preempt(self, victim: Sequence) -> None:
        self.take_out(victim)
        is_kept = self._admission.preempt(victim)
        victim.advance(PhaseEvent.SWAP if is_kept else PhaseEvent.PREEMPT)
        self._prompts.add(victim)
        self.stats.num_preemptions += 1
