"""The step that is launched before the one before it is committed."""

from engine.scheduler.plan import ScheduledSequence, StepPlan
from engine.sequence import Sequence


def in_flight_tokens(running: StepPlan) -> dict[Sequence, int]:
    """How many tokens of each sequence `running` computes: the step behind it starts after them."""
    return {item.sequence: item.num_new_tokens for item in running.scheduled}


class StepAhead:
    """At most one step is ahead of the one that is committed next.

    A sequence that turns out to have ended by then, or that is aborted meanwhile, still writes to
    its blocks in the step ahead. It keeps them until that is committed, because a transfer may
    write to free blocks at any time. One that turns out to know its next token by then doesn't
    sample it in the step ahead.
    """

    def __init__(self) -> None:
        self._plan: StepPlan | None = None
        self._items: dict[Sequence, ScheduledSequence] = {}

    def __contains__(self, sequence: Sequence) -> bool:
        return sequence in self._items

    def put(self, plan: StepPlan) -> StepPlan | None:
        """`plan` is ahead from now on; None if it has nothing to do."""
        if not plan.scheduled:
            return None
        self._plan = plan
        self._items = {item.sequence: item for item in plan.scheduled}
        return plan

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
