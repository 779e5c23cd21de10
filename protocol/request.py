"""A generation request as workers see it, and what they answer."""

from typing import Literal, TypeAlias

import msgspec

from protocol.ids import RequestKey
from protocol.pooling import PoolingParams
from protocol.sampling import SamplingParams

FinishReason: TypeAlias = Literal["stop", "length", "abort"]


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """One sequence to generate; the same on the prefill and the decode worker.

    `token_ids` are the prompt's and, when an earlier attempt already delivered some output, that
    output's: the new attempt goes on behind it. `sampling.max_tokens` counts all output tokens,
    those included; it's never None here, because the router bounds it by the context length.

    `pooling` asks for one vector of the prompt. It comes with the first token, which is then of no
    interest, or from an encode worker without any.
    """

    key: RequestKey
    token_ids: list[int]
    num_prompt_tokens: int
    sampling: SamplingParams
    cache_salt: str | None = None
    priority: int = 0
    pooling: PoolingParams | None = None

    @property
    def reads_prompt(self) -> bool:
        """Whether something is to be told of the prompt itself. A later attempt, behind output
        that was delivered, has it told already."""
        if self.pooling is None and self.sampling.prompt_logprobs is None:
            return False
        return len(self.token_ids) == self.num_prompt_tokens

    @property
    def reads_whole_prompt(self) -> bool:
        """Whether every prompt token has to be run for that, cached or not."""
        if not self.reads_prompt:
            return False
        is_mean = self.pooling is not None and self.pooling.type == "mean"
        return is_mean or self.sampling.prompt_logprobs is not None

    @property
    def ends_with_prefill(self) -> bool:
        """Whether the token that prefill samples is the last one."""
        return len(self.token_ids) + 1 >= self.max_num_tokens

    @property
    def max_num_tokens(self) -> int:
        """Prompt and output together, at most."""
        assert self.sampling.max_tokens is not None, "the router bounds it"
        return self.num_prompt_tokens + self.sampling.max_tokens


class TokenLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """Natural logarithms of the probability of one token and of the likeliest ones at its place.

    Taken from the model's distribution before temperature and penalties, as vLLM's default.
    """

    logprob: float
    rank: int
    top_token_ids: list[int]
    top_logprobs: list[float]


class PhaseTimings(msgspec.Struct, frozen=True, omit_defaults=True):
    """Where a request's time to first token went, in seconds; each worker fills its own part."""

    prefill_queue_s: float | None = None
    prefill_s: float | None = None
    transfer_s: float | None = None
    exposed_transfer_s: float | None = None
    decode_queue_s: float | None = None
    first_step_s: float | None = None


class SequenceOutput(msgspec.Struct, frozen=True, omit_defaults=True):
    """New tokens of one sequence.

    `position` is the index of the first of `token_ids` among the request's output tokens, so a
    receiver delivers each token exactly once, in order, whoever sent it.

    With the first token comes what the request reads of its prompt: `prompt_logprobs` of the
    prompt's second token and on, and `pooled`, float32 in little-endian order.
    """

    key: RequestKey
    position: int
    token_ids: list[int]
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None
    logprobs: list[TokenLogprobs] | None = None
    num_cached_tokens: int | None = None
    timings: PhaseTimings | None = None
    prompt_logprobs: list[TokenLogprobs] | None = None
    pooled: bytes | None = None
