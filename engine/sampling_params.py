"""`LLM`'s sampling parameters: vLLM's fields, those included that want a tokenizer."""

from collections.abc import Sequence

import msgspec

from engine.tokenizer import Tokenizer
from engine.tokenizer.bad_words import bad_word_token_ids
from protocol.errors import InvalidRequestError
from protocol.sampling import SamplingParams as TokenSamplingParams
from protocol.sampling import ThoughtLimit

_OPENING, _CLOSING = "<think>", "</think>"


class SamplingParams(TokenSamplingParams, frozen=True, kw_only=True, omit_defaults=True):
    """What workers follow, and what becomes of text before and behind them.

    `stop` may be one string, and None is none; so is it for `stop_token_ids`. None of `bad_words`
    is written. Thoughts end behind `thinking_token_budget` tokens, for models whose marks of
    thoughts are tokens. Without `detokenize` there is no text. `spaces_between_special_tokens` has
    no effect: these tokenizers write none.
    """

    bad_words: Sequence[str] | None = None
    thinking_token_budget: int | None = None
    detokenize: bool = True
    spaces_between_special_tokens: bool = True

    def __post_init__(self) -> None:
        stop: object = self.stop
        if isinstance(stop, str) or stop is None:
            msgspec.structs.force_setattr(self, "stop", () if stop is None else (stop,))
        stop_token_ids: object = self.stop_token_ids
        if stop_token_ids is None:
            msgspec.structs.force_setattr(self, "stop_token_ids", ())

    def validate(self) -> None:
        super().validate()
        if self.stop and not self.detokenize:
            raise InvalidRequestError(
                "`stop` needs text, so `detokenize` must be on.", field="detokenize"
            )

    def for_tokenizer(self, tokenizer: Tokenizer) -> "SamplingParams":
        """With all that workers need. Raises InvalidRequestError that names the field."""
        changes: dict[str, object] = {}
        if self.bad_words:
            found = bad_word_token_ids(self.bad_words, tokenizer)
            changes["bad_words_token_ids"] = (*self.bad_words_token_ids, *found)
        if self.thinking_token_budget is not None:
            changes["thoughts"] = _thought_limit(self.thinking_token_budget, tokenizer)
        return msgspec.structs.replace(self, **changes) if changes else self


def _thought_limit(max_tokens: int, tokenizer: Tokenizer) -> ThoughtLimit:
    marks = [tokenizer.encode(mark, add_special_tokens=False) for mark in (_OPENING, _CLOSING)]
    if any(len(mark) != 1 for mark in marks):
        raise InvalidRequestError(
            f"`thinking_token_budget` needs a model that has {_OPENING} and {_CLOSING} as tokens.",
            field="thinking_token_budget",
        )
    return ThoughtLimit(
        max_tokens=max_tokens, opening_token_id=marks[0][0], closing_token_id=marks[1][0]
    )
