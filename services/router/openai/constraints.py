"""Token-level limits on an output: the tokens that may come, and the words that may not."""

from typing import Any

from engine.tokenizer import Tokenizer
from protocol.errors import InvalidRequestError
from services.router.openai.bodies import SamplingBody
from services.router.openai.sampling import SamplingLimits, check_token_ids

MAX_BAD_WORDS = 256
MAX_BAD_WORD_CHARS = 256


def token_constraints(
    body: SamplingBody, limits: SamplingLimits, tokenizer: Tokenizer
) -> dict[str, Any]:
    """Fields of `SamplingParams`, those that the body asks for.

    Raises InvalidRequestError that names the client's field.
    """
    fields: dict[str, Any] = {}
    if body.allowed_token_ids is not None:
        if not body.allowed_token_ids:
            raise InvalidRequestError(
                "`allowed_token_ids` must hold at least one token id.", field="allowed_token_ids"
            )
        check_token_ids(body.allowed_token_ids, limits.vocab_size, field="allowed_token_ids")
        fields["allowed_token_ids"] = tuple(sorted(set(body.allowed_token_ids)))
    if body.bad_words:
        fields["bad_words_token_ids"] = _bad_words(body.bad_words, tokenizer)
    return fields


def _bad_words(words: list[str], tokenizer: Tokenizer) -> tuple[tuple[int, ...], ...]:
    """Each word as it's written at the start of a text and behind a blank."""
    if len(words) > MAX_BAD_WORDS:
        raise InvalidRequestError(
            f"`bad_words` may hold at most {MAX_BAD_WORDS} words, got {len(words)}.",
            field="bad_words",
        )
    found: dict[tuple[int, ...], None] = {}
    for word in words:
        if not word or len(word) > MAX_BAD_WORD_CHARS:
            raise InvalidRequestError(
                f"A word in `bad_words` must have 1 to {MAX_BAD_WORD_CHARS} characters.",
                field="bad_words",
            )
        for text in (word, f" {word.lstrip()}"):
            token_ids = tuple(tokenizer.encode(text, add_special_tokens=False))
            if token_ids:
                found[token_ids] = None
    return tuple(found)
