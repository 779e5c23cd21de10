"""Structured outputs: which tokens may come next, by llguidance.

A grammar is compiled in microseconds and explored as far as the output goes, token by token, so
there is nothing to prepare and no large automaton to keep.
"""

import ctypes
import functools
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from protocol.errors import InvalidRequestError
from protocol.structured_outputs import StructuredOutputsParams

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer
    from llguidance._lib import JsonCompileOptions

_WORD_BITS = 32
_NUM_CACHED_GRAMMARS = 256
_REFUSAL = "doesn't satisfy the grammar"  # llguidance's words
# One way to write each value: a small model given free whitespace may write nothing else.
_JSON_STYLE: "JsonCompileOptions" = {
    "whitespace_flexible": False,
    "item_separator": ", ",
    "key_separator": ": ",
}


class GrammarMatcher:
    """How far one output has come in its grammar."""

    def __init__(self, matcher: "LLMatcher") -> None:
        self._matcher = matcher

    @property
    def is_over(self) -> bool:
        """Nothing may follow but the end."""
        return self._matcher.is_stopped() or self._matcher.is_error()

    @property
    def may_end(self) -> bool:
        """The output obeys as it is."""
        return self._matcher.is_accepting()

    @property
    def error(self) -> str:
        """Why the grammar can't be followed any further, in one line; empty if it can."""
        return self._matcher.get_error().strip().split("\n", 1)[0]

    @property
    def has_refused(self) -> bool:
        """Whether a token that the grammar doesn't allow was the error."""
        return _REFUSAL in self.error

    def accept(self, token_id: int) -> bool:
        """Goes on by a token; False if the grammar doesn't allow it here, and is over then."""
        return self.is_over or self._matcher.consume_token(token_id)

    def write_allowed(self, address: int, num_bytes: int) -> None:
        """Writes the tokens that may come next to memory: token i is bit i % 8 of byte i // 8.

        `num_bytes` is the compiler's `mask_bytes`; the address is a multiple of 4.
        """
        self._matcher.unsafe_compute_mask_ptr(address, num_bytes)


class GrammarCompiler:
    """Makes matchers for one model's tokens; threads may share it."""

    def __init__(
        self, tokenizer_file: Path, *, vocab_size: int, eos_token_ids: tuple[int, ...]
    ) -> None:
        """The vocabulary is read on first use. An output ends by one of `eos_token_ids`."""
        self._tokenizer_file = tokenizer_file
        self._vocab_size = vocab_size
        self._eos_token_ids = eos_token_ids
        self.mask_bytes = 4 * -(-vocab_size // _WORD_BITS)
        self._prototype = functools.lru_cache(_NUM_CACHED_GRAMMARS)(self._make_prototype)

    def matcher(self, params: StructuredOutputsParams) -> GrammarMatcher:
        """A new matcher at the output's start. What is no grammar has an `error`, and is over.

        Raises ValueError for what can't even be read as one.
        """
        return GrammarMatcher(self._prototype(params.key).deep_copy())

    def check(self, params: StructuredOutputsParams, field: str) -> None:
        """Compiles, and looks at what an output may start with: what is hopeless shows there.

        Raises InvalidRequestError under the name `field`.
        """
        try:
            matcher = self.matcher(params)
            mask = ctypes.create_string_buffer(self.mask_bytes)
            matcher.write_allowed(ctypes.addressof(mask), self.mask_bytes)
            error = matcher.error
        except ValueError as refused:
            error = str(refused).strip().split("\n", 1)[0]
        if error:
            raise InvalidRequestError(f"`{field}` can't be followed: {error}", field=field)

    def _make_prototype(self, key: bytes) -> "LLMatcher":
        from llguidance import LLMatcher

        grammar = _grammar(msgspec.json.decode(key, type=StructuredOutputsParams))
        return LLMatcher(self._tokenizer, grammar, log_level=0)

    @functools.cached_property
    def _tokenizer(self) -> "LLTokenizer":
        from llguidance import LLTokenizer

        return LLTokenizer(
            str(self._tokenizer_file),
            n_vocab=self._vocab_size,
            eos_token=list(self._eos_token_ids) or None,
        )


def _grammar(params: StructuredOutputsParams) -> str:
    """In llguidance's notation. Raises ValueError if it can't be put so."""
    from llguidance import LLMatcher, grammar_from

    if params.json_object:
        return LLMatcher.grammar_from_json_schema({"type": "object"}, _JSON_STYLE)
    if params.json is not None:
        return LLMatcher.grammar_from_json_schema(params.json, _JSON_STYLE)
    if params.regex is not None:
        return LLMatcher.grammar_from_regex(params.regex)
    if params.choice:
        quoted = (msgspec.json.encode(text).decode() for text in params.choice)
        return "start: " + " | ".join(quoted)
    assert params.grammar is not None, "validated"
    return grammar_from("grammar", params.grammar)
