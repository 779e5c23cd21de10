"""What a step yields for a sequence that samples."""

from dataclasses import dataclass

from engine.sequence import Sequence
from protocol.request import TokenLogprobs


@dataclass(slots=True, frozen=True)
class SampledToken:
    """The next token of `sequence`; `logprobs` if its request asked for them."""

    sequence: Sequence
    token_id: int
    logprobs: TokenLogprobs | None
