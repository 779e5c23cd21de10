"""Grammars by llguidance.

A grammar is compiled in microseconds and explored as far as the output goes, token by token, so
there is nothing to prepare and no large automaton to keep.
"""

import functools
from typing import TYPE_CHECKING

import msgspec

from engine.grammar.interface import GrammarBackend, GrammarMatcher, MatcherFactory
from protocol.structured_outputs import StructuredOutputsParams

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer
    from llguidance._lib import JsonCompileOptions

_REFUSAL = "doesn't satisfy the grammar"  # llguidance's words
_NOTHING_FITS = "NoExtensionBias"  # its name for a grammar that nothing can follow
_REASON = "error: "  # how the line begins in which its regex parser says why
# One way to write each value: a small model given free whitespace may write nothing else.
_JSON_STYLE: "JsonCompileOptions" = {
    "whitespace_flexible": False,
    "item_separator": ", ",
    "key_separator": ": ",
}


class LlguidanceMatcher(GrammarMatcher):
    """See GrammarMatcher."""

    def __init__(self, matcher: "LLMatcher") -> None:
        self._matcher = matcher

    @property
    def is_over(self) -> bool:
        return self._matcher.is_stopped() or self._matcher.is_error()

    @property
    def may_end(self) -> bool:
        return self._matcher.is_accepting()

    @property
    def error(self) -> str:
        return _in_one_line(self._matcher.get_error())

    @property
    def has_refused(self) -> bool:
        return _REFUSAL in self.error

    def accept(self, token_id: int) -> bool:
        return self.is_over or self._matcher.consume_token(token_id)

    def write_allowed(self, address: int, num_bytes: int) -> None:
        self._matcher.unsafe_compute_mask_ptr(address, num_bytes)

    def forced_tokens(self) -> list[int]:
        return [] if self.is_over else self._matcher.compute_ff_tokens()


class LlguidanceBackend(GrammarBackend):
    """See GrammarBackend."""

    def compile(self, params: StructuredOutputsParams) -> MatcherFactory:
        from llguidance import LLMatcher

        prototype = LLMatcher(self._tokenizer, _grammar(params), log_level=0)
        return lambda: LlguidanceMatcher(prototype.deep_copy())

    @functools.cached_property
    def _tokenizer(self) -> "LLTokenizer":
        from llguidance import LLTokenizer

        return LLTokenizer(
            str(self._tokenizer_file),
            n_vocab=self._vocab_size,
            eos_token=list(self._eos_token_ids) or None,
        )


def _in_one_line(error: str) -> str:
    """Of several lines, most of which point at a place, those that say what is wrong there."""
    first, *others = error.strip().split("\n")
    if first == _NOTHING_FITS:
        return "no output can obey it"
    reason = next((line for line in others if line.startswith(_REASON)), None)
    if reason is None or not first.endswith(":"):
        return first
    return f"{first} {reason.removeprefix(_REASON)}"


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
