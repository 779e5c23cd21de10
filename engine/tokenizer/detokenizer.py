"""Tokens to text while they come, a few at a time."""

import codecs
from collections.abc import Sequence

from engine.tokenizer.tokenizer import Tokenizer

_make_decoder = codecs.getincrementaldecoder("utf-8")


class IncrementalDetokenizer:
    """The text of one sequence's output, handed out as soon as its characters are complete.

    Whatever the cut into calls, the parts concatenate to the text of all tokens. A character is
    never split: its bytes wait until the last one is here, and bytes that can't become one turn
    into U+FFFD as soon as that's known. The text is taken to go on behind a prompt, so that a
    leading space belongs to it; `starts_text` says that it stands alone.
    """

    __slots__ = ("_decoder", "_pieces", "_skip_special_tokens", "_strip_space")

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        skip_special_tokens: bool = True,
        starts_text: bool = False,
    ) -> None:
        self._pieces = tokenizer.pieces
        self._skip_special_tokens = skip_special_tokens
        self._strip_space = starts_text and tokenizer.strips_first_space
        self._decoder = _make_decoder("replace")

    def push(self, token_ids: Sequence[int]) -> str:
        """The text that became certain by `token_ids`, maybe none."""
        data = self._pieces.join(token_ids, skip_special_tokens=self._skip_special_tokens)
        if self._strip_space and data:
            self._strip_space = False
            data = data.removeprefix(b" ")
        return self._decoder.decode(data)

    def finish(self) -> str:
        """U+FFFD if the last character's bytes never became complete, else nothing."""
        return self._decoder.decode(b"", final=True)
