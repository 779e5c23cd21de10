"""Encodes chats, whose turns come again with each question: known ones are looked up.

A tokenizer cuts a text at its special tokens before anything else, so a turn that begins with one
has the same tokens whatever surrounds it.
"""

import functools
import re
from array import array
from collections.abc import Iterator
from itertools import pairwise

from tokenizers import Tokenizer as Backend

# Together a few MB at most. Longer turns come again less often than they fill the memory, and
# whoever measures how long one takes could tell whether somebody else has sent it.
MAX_TURNS = 4096
MAX_TURN_CHARS = 1024


class TurnEncoder:
    """`encode` gives what the backend would; safe to use from several threads."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._remembered = functools.lru_cache(MAX_TURNS)(lambda turn: array("I", self._new(turn)))
        added = backend.get_added_tokens_decoder().values()
        marks = sorted((t.content for t in added if not t.normalized), key=len, reverse=True)
        # Where a token depends on the text before it, nothing may be cut off there.
        looks_back = any(token.lstrip or token.single_word for token in added)
        self._mark: re.Pattern[str] | None = None
        if marks and not looks_back and not backend.encode_special_tokens:
            self._mark = re.compile("|".join(map(re.escape, marks)))

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, without any that it doesn't contain itself."""
        token_ids: list[int] = []
        for turn in self._turns(text):
            is_short = len(turn) <= MAX_TURN_CHARS
            token_ids += self._remembered(turn) if is_short else self._new(turn)
        return token_ids

    def _turns(self, text: str) -> Iterator[str]:
        starts = [] if self._mark is None else [m.start() for m in self._mark.finditer(text)]
        for start, end in pairwise((0, *starts, len(text))):
            if start < end:
                yield text[start:end]

    def _new(self, turn: str) -> list[int]:
        # The batch call computes no offsets and lets other Python threads run.
        return self._backend.encode_batch_fast([turn], add_special_tokens=False)[0].ids
