"""A scheduler's decision as plain data: what one step runs, and what came of it."""

from dataclasses import dataclass, field

from engine.scheduler.swap import BlockCopies
from engine.sequence import Sequence
from protocol.request import FinishReason


@dataclass(slots=True)
class ScheduledSequence:
    """`num_new_tokens` tokens of `sequence`, starting at its `start`.

    `samples` is true if the chunk reaches the sequence's last token, so that a token follows.
    In a step that is scheduled ahead, `num_in_flight` tokens before the chunk are computed by the
    step before it; and the last token may still be being sampled there: `source` is its place
    among that step's samples then, and the chunk is this one token.
    """

    sequence: Sequence
    num_new_tokens: int
    samples: bool
    source: int | None = None
    num_in_flight: int = 0

    @property
    def start(self) -> int:
        """The first token's index in its sequence, until the step before is committed."""
        return self.sequence.num_computed_tokens + self.num_in_flight


@dataclass(slots=True, frozen=True)
class StepPlan:
    """One step. Sequences in `preempted` lost their blocks and wait again; `copies` come before
    anything else."""

    scheduled: list[ScheduledSequence] = field(default_factory=list[ScheduledSequence])
    preempted: list[Sequence] = field(default_factory=list[Sequence])
    copies: BlockCopies = field(default_factory=BlockCopies)

    @property
    def num_tokens(self) -> int:
        return sum(item.num_new_tokens for item in self.scheduled)


@dataclass(slots=True)
class SequenceUpdate:
    """Tokens that a step appended to a sequence, up to the one that ended it.

    `stop_token_id` is the one of the request's `stop_token_ids` that ended it; None after an
    end-of-sequence token, as vLLM's `stop_reason`. Either is the last of `new_token_ids`.
    """

    sequence: Sequence
    new_token_ids: list[int]
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None
