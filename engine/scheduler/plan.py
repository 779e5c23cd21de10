"""A scheduler's decision as plain data: what one step runs."""

from dataclasses import dataclass, field

from engine.sequence import Sequence


@dataclass(slots=True, frozen=True)
class ScheduledSequence:
    """`num_new_tokens` tokens of `sequence`, starting at its `num_computed_tokens`.

    `samples` is true if the chunk reaches the sequence's last token, so that a token follows.
    """

    sequence: Sequence
    num_new_tokens: int
    samples: bool


@dataclass(slots=True, frozen=True)
class StepPlan:
    """One step. Sequences in `preempted` lost their blocks and wait again."""

    scheduled: list[ScheduledSequence] = field(default_factory=list[ScheduledSequence])
    preempted: list[Sequence] = field(default_factory=list[Sequence])

    @property
    def num_tokens(self) -> int:
        return sum(item.num_new_tokens for item in self.scheduled)
