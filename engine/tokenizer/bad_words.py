"""Words that an output may not contain, as tokens."""

from collections.abc import Sequence

from engine.tokenizer.tokenizer import Tokenizer
from protocol.errors import InvalidRequestError

MAX_BAD_WORDS = 256
MAX_BAD_WORD_CHARS = 256


def bad_word_token_ids(words: Sequence[str], tokenizer: Tokenizer) -> tuple[tuple[int, ...], ...]:
    """Each word as it's written at the start of a text and behind a blank.

    Raises InvalidRequestError if there are too many, or one is empty or too long.
    """
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
