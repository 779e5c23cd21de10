"""The step behind one whose tokens aren't known yet."""

from collections.abc import Iterable

from engine.block_pool import BlockPool
from engine.scheduler.plan import ScheduledSequence, StepPlan
from engine.scheduler.progress import StopRules
from engine.sequence import Sequence


class StepAhead:
    """At most one step is ahead of the one that is committed next.

    A sequence that turns out to have ended by then, or that is aborted meanwhile, still writes to
    its blocks in the step ahead. It keeps them until that is committed, because a transfer may
    write to free blocks at any time.
    """

    def __init__(self, pool: BlockPool, stop_rules: StopRules) -> None:
        self._pool = pool
        self._stop_rules = stop_rules
        self._plan: StepPlan | None = None
        self._sequences: frozenset[Sequence] = frozenset()

    def __contains__(self, sequence: Sequence) -> bool:
        return sequence in self._sequences

    def clear(self) -> None:
        """The step isn't ahead any more: it's committed next."""
        self._plan, self._sequences = None, frozenset()

    def commit(self, plan: StepPlan) -> None:
        """`plan` has run: if it was ahead, nothing is."""
        if plan is self._plan:
            self.clear()

    def plan(self, decoding: Iterable[Sequence], running: StepPlan) -> StepPlan | None:
        """One more token for those of `decoding` that `running` doesn't end for their length.

        None if that is nobody, or if blocks run out: what others have got by then, they keep.
        """
        sampling = (item.sequence for item in running.scheduled if item.samples)
        sources = {sequence: place for place, sequence in enumerate(sampling)}
        scheduled: list[ScheduledSequence] = []
        for sequence in decoding:
            source = sources.get(sequence)
            num_tokens = sequence.num_tokens + (source is not None)
            if source is not None and num_tokens >= self._stop_rules.max_tokens(sequence):
                continue
            if len(sequence.block_ids) * self._pool.block_size < num_tokens:
                block_ids = self._pool.allocate(1)
                if block_ids is None:
                    return None
                sequence.block_ids += block_ids
            scheduled.append(ScheduledSequence(sequence, 1, samples=True, source=source))
        if not scheduled:
            return None
        self._plan = StepPlan(scheduled)
        self._sequences = frozenset(item.sequence for item in scheduled)
        return self._plan
