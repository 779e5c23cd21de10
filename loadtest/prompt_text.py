"""Texts of an exact number of tokens, the same for the same seed."""

import random
import re
from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer

from protocol.errors import StartupError

# A token of a whole word and the space before it, as byte-level and SentencePiece vocabularies
# spell it. Such words keep their token next to each other, whatever the text.
_WORD_TOKEN = re.compile(r"[Ġ▁]([a-z]{3,10})")
_PLAIN_WORDS = (
    "time year people way day man thing woman life child world school state family student group "
    "country problem hand part place case week company system program question work number night "
    "point home water room mother area money story fact month lot right study book eye job word "
    "business issue side kind head house service friend father power hour game line end member law"
)


class PromptWriter:
    """Writes prompts out of words that are one token each."""

    def __init__(self, words: Sequence[str]) -> None:
        self._words = tuple(words)

    @classmethod
    def for_tokenizer(cls, directory: Path) -> "PromptWriter":
        """Words of this tokenizer. Raises StartupError if there is none to read."""
        path = directory / "tokenizer.json"
        if not path.is_file():
            raise StartupError(f"There is no tokenizer.json in {directory}.")
        tokenizer = Tokenizer.from_file(str(path))
        candidates = sorted(
            match[1]
            for token in tokenizer.get_vocab()
            if (match := _WORD_TOKEN.fullmatch(token)) is not None
        )
        words = [word for word in candidates if _num_tokens(tokenizer, f" {word} {word}") == 2]
        if not words:
            raise StartupError(f"The tokenizer in {directory} has no words with a space before.")
        return cls(words)

    @classmethod
    def for_any_model(cls) -> "PromptWriter":
        """Common English words, which most tokenizers have as one token each."""
        return cls(_PLAIN_WORDS.split())

    def write(self, num_tokens: int, rng: random.Random) -> str:
        """A text of `num_tokens` words, each with a space before it."""
        return "".join(f" {word}" for word in rng.choices(self._words, k=num_tokens))


def _num_tokens(tokenizer: Tokenizer, text: str) -> int:
    return len(tokenizer.encode(text, add_special_tokens=False).ids)
