"""The step behind one whose tokens aren't known yet."""

from engine.block_pool import BlockPool
from engine.scheduler.plan import ScheduledSequence, StepPlan
from engine.scheduler.progress import StopRules
from engine.scheduler.queue import RankedQueue
from engine.scheduler.running import DecodeTokens, chunks_last, grow
from engine.sequence import Sequence


class StepAhead:
    """At most one step is ahead of the one that is committed next.

    A sequence that turns out to have ended by then, or that is aborted meanwhile, still writes to
    its blocks in the step ahead. It keeps them until that is committed, because a transfer may
    write to free blocks at any time. One that turns out to know its next token by then doesn't
    sample it in the step ahead.
    """

    def __init__(self, pool: BlockPool, stop_rules: StopRules, *, max_num_tokens: int) -> None:
        self._pool = pool
        self._stop_rules = stop_rules
        self._max_num_tokens = max_num_tokens
        self._plan: StepPlan | None = None
        self._items: dict[Sequence, ScheduledSequence] = {}

    def __contains__(self, sequence: Sequence) -> bool:
        return sequence in self._items

    def clear(self) -> None:
        """The step isn't ahead any more: it's committed next."""
        self._plan, self._items = None, {}

    def commit(self, plan: StepPlan) -> None:
        """`plan` has run: if it was ahead, nothing is."""
        if plan is self._plan:
            self.clear()

    def token_known(self, sequence: Sequence) -> None:
        """What `sequence` would sample in the step ahead is known already."""
        if sequence in self._items:
            self._items[sequence].samples = False

    def plan(self, decoding: RankedQueue, running: StepPlan) -> StepPlan | None:
        """The known tokens, or else the one being sampled, of those of `decoding` that `running`
        doesn't end for their length.

        None if that is nobody, or if blocks run out: what others have got by then, they keep.
        """
        in_flight = {item.sequence: item.num_new_tokens for item in running.scheduled}
        sampling = (item.sequence for item in running.scheduled if item.samples)
        sources = {sequence: place for place, sequence in enumerate(sampling)}
        tokens = DecodeTokens(self._max_num_tokens, len(decoding))
        scheduled: list[ScheduledSequence] = []
        for sequence in decoding:
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
        if not scheduled:
            return None
        self._plan = StepPlan(chunks_last(scheduled))
        self._items = {item.sequence: item for item in scheduled}
        return self._plan
