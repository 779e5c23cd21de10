"""What `LLM` returns; vLLM's names."""

from dataclasses import dataclass
from typing import Self

import numpy as np

from protocol.request import FinishReason


@dataclass(frozen=True, slots=True)
class Logprob:
    """A token's log-probability, its rank (1 is the likeliest) and its text."""

    logprob: float
    rank: int
    decoded_token: str


@dataclass(frozen=True, slots=True)
class CompletionOutput:
    """One of a request's `n` outputs.

    `stop_reason` is the stop string or stop token id that ended it, None after an
    end-of-sequence token; of an output that couldn't go on (its `finish_reason` is "abort"), it's
    the reason in words. `logprobs` has, for each token, the likeliest tokens and itself.
    """

    index: int
    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    stop_reason: int | str | None
    logprobs: list[dict[int, Logprob]] | None
    cumulative_logprob: float | None


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """A prompt and its outputs; `prompt` is None if it came as tokens.

    `num_cached_tokens` of the prompt were found in the prefix cache, counted for the first output.
    `prompt_logprobs`, if asked for, has an entry for each prompt token, None for the first.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    num_cached_tokens: int
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    finished: bool = True  # nothing is returned before its end


@dataclass(frozen=True, slots=True)
class Embedding:
    """One prompt's vector."""

    embedding: list[float]

    @classmethod
    def of(cls, vector: bytes) -> Self:
        """From float32 in little-endian order."""
        return cls(np.frombuffer(vector, "<f4").tolist())


@dataclass(frozen=True, slots=True)
class EmbeddingRequestOutput:
    """A prompt and its vector."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: Embedding


@dataclass(frozen=True, slots=True)
class BeamSearchSequence:
    """A way to go on behind a prompt; `text` has the prompt in front, as `tokens` have."""

    tokens: list[int]
    text: str
    cum_logprob: float
    finish_reason: FinishReason


@dataclass(frozen=True, slots=True)
class BeamSearchOutput:
    """The best ways found, best first."""

    sequences: list[BeamSearchSequence]
