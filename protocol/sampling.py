"""How tokens are chosen and when generation ends; vLLM's names and defaults."""

import math

import msgspec

from protocol.errors import InvalidRequestError
from protocol.structured_outputs import StructuredOutputsParams

MAX_LOGPROBS = 20


class ThoughtLimit(msgspec.Struct, frozen=True, kw_only=True):
    """Behind `max_tokens` tokens of thoughts the closing token comes.

    Thoughts are what follows the opening token, if that is an output's first; with `starts_inside`
    the output begins with thoughts in any case.
    """

    max_tokens: int
    opening_token_id: int
    closing_token_id: int
    starts_inside: bool = False


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One sequence's sampling parameters; `n` is for the router and `LLM`, which ask n times.

    Stop strings are matched where text exists (router, `LLM`); workers see `stop_token_ids` only.
    `prompt_logprobs` asks for those of the prompt's own tokens, with that many of the likeliest.
    `allowed_token_ids` are the only ones that may be chosen, besides an end; none of
    `bad_words_token_ids` comes as a whole. `thoughts` bounds those of outputs without a grammar.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    max_tokens: int | None = 16
    min_tokens: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    logit_bias: dict[int, float] | None = None
    structured_outputs: StructuredOutputsParams | None = None
    allowed_token_ids: tuple[int, ...] | None = None
    bad_words_token_ids: tuple[tuple[int, ...], ...] = ()
    thoughts: ThoughtLimit | None = None

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0.0

    def validate(self) -> None:
        """Raises InvalidRequestError that names the first field out of range."""
        for name, low, high, wanted in RANGES:
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise InvalidRequestError(f"`{name}` must be {wanted}, got {value}.", field=name)
        if not 0.0 < self.top_p <= 1.0:
            raise InvalidRequestError(
                f"`top_p` must be in (0, 1], got {self.top_p}.", field="top_p"
            )
        if not 0.0 < self.repetition_penalty < math.inf:
            raise InvalidRequestError(
                f"`repetition_penalty` must be greater than 0, got {self.repetition_penalty}.",
                field="repetition_penalty",
            )
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise InvalidRequestError(
                f"`min_tokens` ({self.min_tokens}) must not exceed `max_tokens` "
                f"({self.max_tokens}).",
                field="min_tokens",
            )
        for token_id, bias in (self.logit_bias or {}).items():
            if token_id < 0 or not -100.0 <= bias <= 100.0:
                raise InvalidRequestError(
                    "`logit_bias` maps token ids to values between -100 and 100, "
                    f"got {token_id}: {bias}.",
                    field="logit_bias",
                )
        if self.structured_outputs is not None:
            self.structured_outputs.validate("structured_outputs")
        if self.allowed_token_ids is not None and min(self.allowed_token_ids, default=-1) < 0:
            raise InvalidRequestError(
                "`allowed_token_ids` must hold at least one token id, none below 0.",
                field="allowed_token_ids",
            )
        if any(not word or min(word) < 0 for word in self.bad_words_token_ids):
            raise InvalidRequestError(
                "`bad_words_token_ids` must hold token ids, none below 0.",
                field="bad_words_token_ids",
            )
        if self.thoughts is not None and self.thoughts.max_tokens < 0:
            raise InvalidRequestError(
                f"`thoughts` may not be limited to {self.thoughts.max_tokens} tokens.",
                field="thoughts",
            )
        if any(not text for text in self.stop):
            raise InvalidRequestError("`stop` must not contain an empty string.", field="stop")


# Name, least and greatest value, and both in words.
RANGES: tuple[tuple[str, float, float, str], ...] = (
    ("n", 1, 128, "between 1 and 128"),
    ("temperature", 0.0, 100.0, "between 0 and 100"),
    ("top_k", -1, 2**31 - 1, "-1, 0 or a positive integer"),
    ("min_p", 0.0, 1.0, "between 0 and 1"),
    ("presence_penalty", -2.0, 2.0, "between -2 and 2"),
    ("frequency_penalty", -2.0, 2.0, "between -2 and 2"),
    ("seed", -(2**63), 2**63 - 1, "a 64-bit integer"),
    ("max_tokens", 1, 2**31 - 1, "at least 1"),
    ("min_tokens", 0, 2**31 - 1, "at least 0"),
    ("logprobs", 0, MAX_LOGPROBS, f"between 0 and {MAX_LOGPROBS}"),
    ("prompt_logprobs", 0, MAX_LOGPROBS, f"between 0 and {MAX_LOGPROBS}"),
)
