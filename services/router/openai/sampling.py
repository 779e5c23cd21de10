"""From the fields of a request body to `SamplingParams`."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from protocol.errors import ContextLengthError, InvalidRequestError
from protocol.sampling import SamplingParams
from services.router.openai.bodies import ChatBody, CompletionBody, SamplingBody

MAX_STOP_STRINGS = 64
MAX_STOP_CHARS = 1024
MAX_STOP_TOKEN_IDS = 1024
MAX_LOGIT_BIAS = 1024
MAX_BEST_OF = 128

# Fields that a body and `SamplingParams` have in common, name and meaning.
_COMMON_FIELDS = (
    "n",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "seed",
    "min_tokens",
    "prompt_logprobs",
    "include_stop_str_in_output",
    "ignore_eos",
    "skip_special_tokens",
)


@dataclass(frozen=True, slots=True)
class SamplingLimits:
    """What the model allows, and what its makers recommend where a body says nothing."""

    max_model_len: int
    vocab_size: int
    defaults: dict[str, Any] = field(default_factory=dict[str, Any])


def completion_sampling(body: CompletionBody, limits: SamplingLimits) -> SamplingParams:
    """Raises InvalidRequestError that names the field as the client wrote it.

    An echo with `logprobs` has the prompt's, too; with `max_tokens` 0 it's all that there is, and
    the one token that prefill samples anyway is left out of the answer (`is_prompt_only`).
    """
    sampling = _sampling(
        body,
        limits,
        max_tokens=16 if body.max_tokens is None else body.max_tokens or int(is_prompt_only(body)),
        logprobs=body.logprobs,
    )
    if body.echo and body.logprobs is not None and body.prompt_logprobs is None:
        return msgspec.structs.replace(sampling, prompt_logprobs=body.logprobs)
    return sampling


def is_prompt_only(body: CompletionBody) -> bool:
    """Whether no output is asked for. Where the prompt isn't either, it's a mistake."""
    return body.max_tokens == 0 and (body.echo is True or body.prompt_logprobs is not None)


def chat_sampling(body: ChatBody, limits: SamplingLimits) -> SamplingParams:
    """As `completion_sampling`; `max_completion_tokens` wins over its older name."""
    if body.top_logprobs and not body.logprobs:
        raise InvalidRequestError("`top_logprobs` needs `logprobs` to be true.", field="logprobs")
    renamed: dict[str, str] = {}
    max_tokens = body.max_tokens
    if body.logprobs:
        renamed["logprobs"] = "top_logprobs"
    if body.max_completion_tokens is not None:
        max_tokens = body.max_completion_tokens
        renamed["max_tokens"] = "max_completion_tokens"
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    try:
        return _sampling(body, limits, max_tokens=max_tokens, logprobs=logprobs)
    except InvalidRequestError as error:
        if error.field not in renamed:
            raise
        name = renamed[error.field]
        message = error.message.replace(f"`{error.field}`", f"`{name}`")
        raise InvalidRequestError(message, field=name) from error


def bounded_max_tokens(
    sampling: SamplingParams, num_prompt_tokens: int, limits: SamplingLimits, *, prompt_field: str
) -> int:
    """How many tokens the request may generate behind a prompt of this length.

    Raises ContextLengthError if the prompt leaves no room, or less than was asked for.
    """
    max_model_len = limits.max_model_len
    room = max_model_len - num_prompt_tokens
    if room < 1:
        raise ContextLengthError(
            f"This model's maximum context length is {max_model_len} tokens, and one of them must "
            f"be left for the output; the prompt has {num_prompt_tokens}.",
            field=prompt_field,
        )
    # validate() has seen to it that min_tokens isn't more than max_tokens.
    wanted = sampling.min_tokens if sampling.max_tokens is None else sampling.max_tokens
    if wanted > room:
        raise ContextLengthError(
            f"This model's maximum context length is {max_model_len} tokens; you asked for "
            f"{num_prompt_tokens + wanted} ({num_prompt_tokens} in the prompt, {wanted} for the "
            "output).",
            field=prompt_field,
        )
    return room if sampling.max_tokens is None else wanted


def _sampling(
    body: SamplingBody, limits: SamplingLimits, *, max_tokens: int | None, logprobs: int | None
) -> SamplingParams:
    if body.stream_options is not None and not body.stream:
        raise InvalidRequestError(
            "`stream_options` is for streams only; set `stream` to true.", field="stream_options"
        )
    check_priority(body.priority)
    if body.cache_salt is not None and not 1 <= len(body.cache_salt) <= 1024:
        raise InvalidRequestError(
            "`cache_salt` must have between 1 and 1024 characters.", field="cache_salt"
        )
    if body.prompt_logprobs is not None and body.stream:
        raise InvalidRequestError("`prompt_logprobs` are not for streams.", field="prompt_logprobs")
    given = {name: value for name in _COMMON_FIELDS if (value := getattr(body, name)) is not None}
    sampling = SamplingParams(
        **(limits.defaults | given),
        max_tokens=max_tokens,
        logprobs=logprobs,
        stop=_stop(body.stop),
        stop_token_ids=_token_ids(body.stop_token_ids, limits),
        logit_bias=_logit_bias(body.logit_bias, limits),
    )
    sampling.validate()
    return _with_best_of(body, sampling)


def _with_best_of(body: SamplingBody, sampling: SamplingParams) -> SamplingParams:
    """As many outputs as are compared, with the logprobs that they're compared by."""
    best_of = body.best_of
    if best_of is None or best_of == sampling.n:
        return sampling
    if not sampling.n <= best_of <= MAX_BEST_OF:
        raise InvalidRequestError(
            f"`best_of` must be between `n` ({sampling.n}) and {MAX_BEST_OF}, got {best_of}.",
            field="best_of",
        )
    if body.stream:
        raise InvalidRequestError(
            "`best_of` is not for streams: the best is known at the end only.", field="best_of"
        )
    return msgspec.structs.replace(sampling, n=best_of, logprobs=sampling.logprobs or 0)


def _stop(stop: str | list[str] | None) -> tuple[str, ...]:
    if stop is None:
        return ()
    texts = (stop,) if isinstance(stop, str) else tuple(stop)
    if len(texts) > MAX_STOP_STRINGS:
        raise InvalidRequestError(
            f"`stop` may hold at most {MAX_STOP_STRINGS} strings, got {len(texts)}.", field="stop"
        )
    if any(len(text) > MAX_STOP_CHARS for text in texts):
        raise InvalidRequestError(
            f"A `stop` string may have at most {MAX_STOP_CHARS} characters.", field="stop"
        )
    return texts


def _token_ids(token_ids: Sequence[int] | None, limits: SamplingLimits) -> tuple[int, ...]:
    if token_ids is None:
        return ()
    if len(token_ids) > MAX_STOP_TOKEN_IDS:
        raise InvalidRequestError(
            f"`stop_token_ids` may hold at most {MAX_STOP_TOKEN_IDS} ids.", field="stop_token_ids"
        )
    check_token_ids(token_ids, limits.vocab_size, field="stop_token_ids")
    return tuple(token_ids)


def check_token_ids(token_ids: Sequence[int], vocab_size: int, *, field: str) -> None:
    """Raises InvalidRequestError if an id isn't one of the model's."""
    if token_ids and not (min(token_ids) >= 0 and max(token_ids) < vocab_size):
        raise InvalidRequestError(
            f"`{field}` must hold token ids between 0 and {vocab_size - 1}.", field=field
        )


def _logit_bias(bias: dict[str, float] | None, limits: SamplingLimits) -> dict[int, float] | None:
    if not bias:
        return None
    if len(bias) > MAX_LOGIT_BIAS:
        raise InvalidRequestError(
            f"`logit_bias` may hold at most {MAX_LOGIT_BIAS} tokens.", field="logit_bias"
        )
    by_id: dict[int, float] = {}
    for key, value in bias.items():
        if not key.isascii() or not key.isdecimal() or len(key) > 10:
            raise InvalidRequestError(
                f"`logit_bias` has the key {key[:40]!r}, which is no token id.", field="logit_bias"
            )
        if not math.isfinite(value) or not -100 <= value <= 100:
            raise InvalidRequestError(
                f"`logit_bias` values must be between -100 and 100, got {value}.",
                field="logit_bias",
            )
        by_id[int(key)] = value
    check_token_ids(list(by_id), limits.vocab_size, field="logit_bias")
    return by_id


def check_priority(priority: int | None) -> None:
    """Raises InvalidRequestError for one that doesn't fit 32 bits."""
    low, high = -(2**31), 2**31 - 1
    if priority is not None and not low <= priority <= high:
        raise InvalidRequestError(
            f"`priority` must be between {low} and {high}, got {priority}.", field="priority"
        )
