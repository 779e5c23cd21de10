"""What a step yields for a sequence that samples."""

from dataclasses import dataclass, field

from engine.sequence import Sequence
from protocol.request import TokenLogprobs


@dataclass(slots=True, frozen=True)
class PromptReport:
    """What a request wanted to know of its prompt; see `SequenceOutput`."""

    logprobs: list[TokenLogprobs] | None = None
    pooled: bytes | None = None


NO_REPORT = PromptReport()


@dataclass(slots=True, frozen=True)
class OutputFailure:
    """Why nothing can follow what an output has so far; `field` is the sampling parameter to
    blame, None if this worker is."""

    message: str
    field: str | None = None


@dataclass(slots=True, frozen=True)
class SampledToken:
    """The next token of `sequence`, and those that a grammar forces behind it, if it jumps
    (engine/jump_ahead.py); `logprobs` and `prompt` if its request asked for them.

    With a `failure` it's no token of any worth: the sequence has to be given up.
    """

    sequence: Sequence
    token_id: int
    logprobs: TokenLogprobs | None
    prompt: PromptReport = NO_REPORT
    failure: OutputFailure | None = None
    forced_token_ids: list[int] = field(default_factory=list[int])

    @property
    def token_ids(self) -> list[int]:
        """All of them, in order."""
        return [self.token_id, *self.forced_token_ids]
