"""What a step yields for a sequence that samples."""

from dataclasses import dataclass

from engine.sequence import Sequence
from protocol.request import TokenLogprobs


@dataclass(slots=True, frozen=True)
class PromptReport:
    """What a request wanted to know of its prompt; see `SequenceOutput`."""

    logprobs: list[TokenLogprobs] | None = None
    pooled: bytes | None = None


NO_REPORT = PromptReport()


@dataclass(slots=True, frozen=True)
class SampledToken:
    """The next token of `sequence`; `logprobs` and `prompt` if its request asked for them."""

    sequence: Sequence
    token_id: int
    logprobs: TokenLogprobs | None
    prompt: PromptReport = NO_REPORT
