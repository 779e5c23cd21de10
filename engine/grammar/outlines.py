"""Grammars by outlines-core: a regular expression, compiled to a table of states and tokens.

Where an output may end, the table lacks tokens of one byte that would go on from there (0.2.14):
what can't be spelled otherwise is never written. What is written obeys.
"""

import functools
import json
import re
from typing import TYPE_CHECKING

from engine.grammar.interface import GrammarBackend, GrammarMatcher, MatcherFactory
from engine.grammar.json_rules import JsonRules
from engine.grammar.masks import allow_also, write_only
from engine.grammar.vocabulary import read_vocabulary, without_control_characters
from protocol.structured_outputs import StructuredOutputsParams

if TYPE_CHECKING:
    from outlines_core import Guide, Vocabulary

# What a pattern matches is written into JSON as it is.
_ESCAPE = r'\\[dw]|\\[^\w"\\]'
_MEMBER = rf'[0-9]-[0-9]|[a-z]-[a-z]|[A-Z]-[A-Z]|{_ESCAPE}|[^\\"\[\]\-^]'
_PLAIN_PATTERN = re.compile(rf'(?:{_ESCAPE}|[^\\."\[]|\[-?(?:{_MEMBER})+-?\])*')
# A regular expression has an end: its objects hold no objects. One level more takes a second.
_SCALARS = [{"type": name} for name in ("string", "number", "boolean", "null")]
_ARRAY = {"type": "array", "items": {"anyOf": _SCALARS}}
_ANY_OBJECT = {"type": "object", "additionalProperties": {"anyOf": [*_SCALARS, _ARRAY]}}
_META_CHARACTER = re.compile(r"[\\.+*?()|\[\]{}^$#&\-~]")


class OutlinesMatcher(GrammarMatcher):
    """See GrammarMatcher."""

    def __init__(self, guide: "Guide", eos_token_ids: tuple[int, ...]) -> None:
        """The guide knows the first of `eos_token_ids`."""
        self._guide = guide
        self._eos_token_ids = eos_token_ids
        self._has_ended = False
        self._refused: int | None = None

    @property
    def is_over(self) -> bool:
        return self._has_ended or self.has_refused

    @property
    def may_end(self) -> bool:
        return self._guide.is_finished()

    @property
    def error(self) -> str:
        return f"it doesn't allow token {self._refused} there" if self.has_refused else ""

    @property
    def has_refused(self) -> bool:
        return self._refused is not None

    def accept(self, token_id: int) -> bool:
        if self.is_over:
            return True
        if token_id in self._eos_token_ids and self.may_end:
            self._has_ended = True
            return True
        try:
            self._guide.advance(token_id, return_tokens=False)
        except ValueError:
            self._refused = token_id
            return False
        return True

    def write_allowed(self, address: int, num_bytes: int) -> None:
        if self.is_over:
            write_only(self._eos_token_ids, address, num_bytes)
            return
        self._guide.write_mask_into(address, num_bytes // 4, 4)
        if self.may_end:
            allow_also(self._eos_token_ids[1:], address, num_bytes)

    def forced_tokens(self) -> list[int]:
        """None: masks hold every way to spell bytes that must follow, not one of them."""
        return []


class OutlinesBackend(GrammarBackend):
    """See GrammarBackend."""

    def compile(self, params: StructuredOutputsParams) -> MatcherFactory:
        from outlines_core import Guide, Index

        if not self._eos_token_ids:
            raise ValueError("the model has no token that ends an output")
        is_json = params.json_object or params.json is not None
        index = Index(_regex(params), self._json_vocabulary if is_json else self._vocabulary)
        return lambda: OutlinesMatcher(Guide(index), self._eos_token_ids)

    @functools.cached_property
    def _vocabulary(self) -> "Vocabulary":
        return self._vocabulary_of(self._texts)

    @functools.cached_property
    def _json_vocabulary(self) -> "Vocabulary":
        """A pattern inside a JSON string would match its raw control characters, too."""
        return self._vocabulary_of(without_control_characters(self._texts))

    @functools.cached_property
    def _texts(self) -> list[bytes]:
        return read_vocabulary(self._tokenizer_file, vocab_size=self._vocab_size)

    def _vocabulary_of(self, texts: list[bytes]) -> "Vocabulary":
        from outlines_core import Vocabulary

        ids: dict[bytes, list[int]] = {}
        for i, text in enumerate(texts):
            if text and i not in self._eos_token_ids:
                ids.setdefault(text, []).append(i)
        return Vocabulary(self._eos_token_ids[0], ids)


def _regex(params: StructuredOutputsParams) -> str:
    """Raises ValueError if it can't be put so."""
    if params.json_object:
        return _json_regex(json.dumps(_ANY_OBJECT))
    if params.json is not None:
        return _json_regex(_RULES.exact(params.json))
    if params.regex is not None:
        return params.regex
    if params.choice:
        # An alternative that has matched ends the search for those behind it.
        longest_first = sorted(params.choice, key=len, reverse=True)
        return "|".join(_META_CHARACTER.sub(r"\\\g<0>", text) for text in longest_first)
    raise ValueError("outlines follows no `grammar`; llguidance and xgrammar do")


def _json_regex(schema: str) -> str:
    from outlines_core.json_schema import build_regex_from_schema

    try:
        return build_regex_from_schema(schema)
    except TypeError as error:
        raise ValueError(str(error)) from error


def _check_pattern(pattern: str) -> None:
    if not _PLAIN_PATTERN.fullmatch(pattern):
        raise ValueError(
            "outlines doesn't follow a `pattern` that could match quotes or backslashes: it may "
            "have letters, digits, \\d, \\w and lists of such in brackets, but no dot"
        )


_RULES = JsonRules(
    "outlines",
    {
        "string": frozenset({"minLength", "maxLength", "pattern", "format"}),
        "array": frozenset({"items", "minItems", "maxItems"}),
        "object": frozenset({"properties", "required", "additionalProperties"}),
    },
    _check_pattern,
    escapes_names=False,
)
