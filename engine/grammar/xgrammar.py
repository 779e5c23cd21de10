"""Grammars by xgrammar, an automaton with a stack that is compiled ahead of its use."""

import ctypes
import functools
import json
import re
from typing import TYPE_CHECKING

from engine.grammar.interface import GrammarBackend, GrammarMatcher, MatcherFactory
from engine.grammar.json_rules import JsonRules
from engine.grammar.masks import write_only
from engine.grammar.vocabulary import read_vocabulary, without_control_characters
from protocol.structured_outputs import StructuredOutputsParams

if TYPE_CHECKING:
    import xgrammar

_ORIGIN = re.compile(r"^\[[0-9:]+\] \S+:[0-9]+: ")  # of a message in the library's source
_ESCAPE_OR_CLASS = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]")
_CHOICE = re.compile(r"\||\)(?:[*?]|\{0?,|\{0\})")
_REPETITION_IN_GROUP = re.compile(r"\(.*(?:[*+]|[^(]\?|\{[0-9]*,[0-9]*\}).*\)", re.DOTALL)
_UNQUOTED = re.compile(r'"|\\[\\xuntrfvc0-9]')  # a pattern writes these into JSON as they are


class XgrammarMatcher(GrammarMatcher):
    """See GrammarMatcher."""

    def __init__(self, matcher: "xgrammar.GrammarMatcher", eos_token_ids: tuple[int, ...]) -> None:
        self._matcher = matcher
        self._eos_token_ids = eos_token_ids
        self._refused: int | None = None

    @property
    def is_over(self) -> bool:
        return self.has_refused or self._matcher.is_terminated()

    @property
    def may_end(self) -> bool:
        return self._matcher.is_completed()

    @property
    def error(self) -> str:
        return f"it doesn't allow token {self._refused} there" if self.has_refused else ""

    @property
    def has_refused(self) -> bool:
        return self._refused is not None

    def accept(self, token_id: int) -> bool:
        if self.is_over or self._matcher.accept_token(token_id):
            return True
        self._refused = token_id
        return False

    def write_allowed(self, address: int, num_bytes: int) -> None:
        import numpy as np

        if self.is_over:
            write_only(self._eos_token_ids, address, num_bytes)
            return
        words = (ctypes.c_int32 * (num_bytes // 4)).from_address(address)
        self._matcher.fill_next_token_bitmask(np.ctypeslib.as_array(words).reshape(1, -1))

    def forced_tokens(self) -> list[int]:
        """None: masks hold every way to spell bytes that must follow, not one of them."""
        return []


class XgrammarBackend(GrammarBackend):
    """See GrammarBackend."""

    def compile(self, params: StructuredOutputsParams) -> MatcherFactory:
        import xgrammar

        try:
            compiled = self._compile(params)
        except RuntimeError as refused:  # the only kind that it raises for what a user wrote
            raise ValueError(_ORIGIN.sub("", str(refused))) from refused
        return lambda: XgrammarMatcher(xgrammar.GrammarMatcher(compiled), self._eos_token_ids)

    def _compile(self, params: StructuredOutputsParams) -> "xgrammar.CompiledGrammar":
        if params.json_object:
            return self._json_schema('{"type": "object"}')
        if params.json is not None:
            return self._json_schema(_RULES.exact(params.json))
        compiler = self._compiler
        if params.regex is not None:
            _check_anchors(params.regex, "regex")
            return compiler.compile_regex(params.regex)
        if params.choice:
            choices = " | ".join(json.dumps(text, ensure_ascii=False) for text in params.choice)
            return compiler.compile_grammar(f"root ::= {choices}")
        assert params.grammar is not None, "validated"
        if "::=" in params.grammar:
            return compiler.compile_grammar(params.grammar)
        return compiler.compile_lark(params.grammar)

    def _json_schema(self, schema: str) -> "xgrammar.CompiledGrammar":
        # One way to write each value: a small model given free whitespace may write nothing else.
        return self._json_compiler.compile_json_schema(
            schema, any_whitespace=False, separators=(", ", ": "), strict_mode=False
        )

    @functools.cached_property
    def _compiler(self) -> "xgrammar.GrammarCompiler":
        return self._compiler_of(self._vocabulary)

    @functools.cached_property
    def _json_compiler(self) -> "xgrammar.GrammarCompiler":
        """Its strings with a length would have raw control characters in them, which no JSON has:
        tokens with such aren't there."""
        return self._compiler_of(without_control_characters(self._vocabulary))

    @functools.cached_property
    def _vocabulary(self) -> list[bytes]:
        return read_vocabulary(self._tokenizer_file, vocab_size=self._vocab_size)

    def _compiler_of(self, vocabulary: list[bytes]) -> "xgrammar.GrammarCompiler":
        import xgrammar

        tokens = xgrammar.TokenizerInfo(
            vocabulary,
            vocab_type=xgrammar.VocabType.RAW,
            vocab_size=self._vocab_size,
            stop_token_ids=list(self._eos_token_ids) or None,
        )
        # Compiled grammars are kept by whoever asks for them.
        return xgrammar.GrammarCompiler(tokens, max_threads=1, cache_enabled=False)


def _check_anchors(regex: str, what: str) -> None:
    plain = _ESCAPE_OR_CLASS.sub("x", regex).removeprefix("^").removesuffix("$")
    if "^" in plain or "$" in plain:
        raise ValueError(f"xgrammar doesn't follow a `{what}` with `^` or `$` inside of it")


def _check_pattern(pattern: str) -> None:
    _check_anchors(pattern, "pattern")
    if _UNQUOTED.search(pattern):
        raise ValueError(
            "xgrammar doesn't follow a `pattern` with quotes, backslashes or codes of characters"
        )
    # In JSON's strings (0.2.8), `(a|b+)` and `(ab+)?` also match what only their ends would.
    plain = _ESCAPE_OR_CLASS.sub("x", pattern)
    grouped = f"({plain})" if "|" in plain else plain
    if _CHOICE.search(plain) and _REPETITION_IN_GROUP.search(grouped):
        raise ValueError(
            "xgrammar doesn't follow a `pattern` with repetitions inside of alternatives or of "
            "optional groups"
        )


_BOUNDS = frozenset({"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"})
_RULES = JsonRules(
    "xgrammar",
    {
        "string": frozenset({"minLength", "maxLength", "pattern", "format"}),
        "integer": _BOUNDS | {"multipleOf"},
        "number": _BOUNDS,
        "array": frozenset({"items", "prefixItems", "minItems", "maxItems"}),
        "object": frozenset(
            {"properties", "required", "additionalProperties", "minProperties", "maxProperties"}
        ),
    },
    _check_pattern,
)
