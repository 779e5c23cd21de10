"""Finds tool calls in a model's text, as it comes.

What is no call is passed on at once, but for a tail that may begin one. A call is passed on when
it is whole, and then as one piece, so its arguments are always valid JSON; text that only looked
like a call is passed on as text. Where the text is cut makes no difference to what comes out.
"""

import ast
import json
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, cast


@dataclass(frozen=True, slots=True)
class ToolCallPiece:
    """Some of a call: its name once, and arguments to be joined, as JSON text.

    `num_chars_before` are the characters of content before it, of what the same text came to.
    """

    index: int
    name: str | None
    arguments: str
    num_chars_before: int = field(default=0, compare=False)


@dataclass(slots=True)
class Parsed:
    """What some text came to: words for the user, and calls."""

    content: str = ""
    calls: list[ToolCallPiece] = field(default_factory=list[ToolCallPiece])

    def add(self, following: "Parsed") -> None:
        num_chars = len(self.content)
        self.calls += [
            replace(call, num_chars_before=num_chars + call.num_chars_before)
            for call in following.calls
        ]
        self.content += following.content


class ToolParser(Protocol):
    """One output's parser: `push` its texts in order, then `finish` once."""

    def push(self, text: str) -> Parsed: ...

    def finish(self) -> Parsed: ...


@dataclass(frozen=True, slots=True)
class Call:
    name: str
    arguments: Mapping[str, Any]

    def piece(self, index: int) -> ToolCallPiece:
        return ToolCallPiece(index, self.name, json.dumps(self.arguments, ensure_ascii=False))


# Reads what stands between the marks; None if it's no call.
ReadCalls = Callable[[str], "list[Call] | None"]


class NamedCallParser:
    """All text is the arguments of one call: a grammar sees to that."""

    def __init__(self, name: str) -> None:
        self._name: str | None = name

    def push(self, text: str) -> Parsed:
        if not text:
            return Parsed()
        name, self._name = self._name, None
        return Parsed(calls=[ToolCallPiece(0, name, text)])

    def finish(self) -> Parsed:
        return Parsed()


class MarkedCallsParser:
    """Calls stand between two marks, in a text that may have several such places.

    Without a closing mark the calls reach to the end of the output; without an opening one they
    are the whole output.
    """

    def __init__(self, read: ReadCalls, *, opening: str, closing: str) -> None:
        self._read = read
        self._opening = opening
        self._closing = closing
        self._inside = not opening
        self._held = ""
        self._num_calls = 0

    def push(self, text: str) -> Parsed:
        self._held += text
        parsed = Parsed()
        while self._step(parsed):
            pass
        return parsed

    def finish(self) -> Parsed:
        held, self._held = self._held, ""
        if not self._inside:
            return Parsed(content=held)
        self._inside = False
        # A model may end right behind the call and leave the closing mark out.
        return self._calls(held, "")

    def _step(self, parsed: Parsed) -> bool:
        """Passes on what is decided; True if there may be more."""
        if self._inside:
            end = self._held.find(self._closing) if self._closing else -1
            if end < 0:
                return False
            inner, self._held = self._held[:end], self._held[end + len(self._closing) :]
            self._inside = False
            parsed.add(self._calls(inner, self._closing))
            return True
        start = self._held.find(self._opening) if self._opening else -1
        if start < 0:
            num_kept = _overlap(self._held, self._opening)
            cut = len(self._held) - num_kept
            parsed.content += self._held[:cut]
            self._held = self._held[cut:]
            return False
        parsed.content += self._held[:start]
        self._held = self._held[start + len(self._opening) :]
        self._inside = True
        return True

    def _calls(self, inner: str, closing: str) -> Parsed:
        calls = self._read(inner)
        if not calls:
            return Parsed(content=self._opening + inner + closing)
        first, self._num_calls = self._num_calls, self._num_calls + len(calls)
        return Parsed(calls=[call.piece(first + i) for i, call in enumerate(calls)])


def _overlap(text: str, mark: str) -> int:
    """Length of the longest end of `text` that begins `mark`."""
    for size in range(min(len(text), len(mark) - 1), 0, -1):
        if text.endswith(mark[:size]):
            return size
    return 0


def read_json_call(text: str) -> list[Call] | None:
    """`{"name": …, "arguments": {…}}`; some models write "parameters"."""
    call = _as_call(_json(text))
    return None if call is None else [call]


def read_json_calls(text: str) -> list[Call] | None:
    """A list of such objects, one alone, or several with semicolons between them."""
    value = _json(text)
    if value is None and ";" in text:
        value = [_json(part) for part in text.split(";")]
    if not isinstance(value, list):
        value = [value]
    calls = [_as_call(item) for item in cast("list[Any]", value)]
    if not calls or None in calls:
        return None
    return [call for call in calls if call is not None]


def read_pythonic_calls(text: str) -> list[Call] | None:
    """`[get_weather(city="Paris"), get_time()]`, values as Python literals."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)  # the model's Python, not ours
            expression = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        return None
    if not isinstance(expression, ast.List):
        return None
    calls: list[Call] = []
    for node in expression.elts:
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name) or node.args:
            return None
        arguments: dict[str, Any] = {}
        for keyword in node.keywords:
            if keyword.arg is None:
                return None
            try:
                arguments[keyword.arg] = ast.literal_eval(keyword.value)
                json.dumps(arguments[keyword.arg])
            except (ValueError, TypeError, MemoryError, RecursionError):
                return None
        calls.append(Call(node.func.id, arguments))
    return calls or None


def _json(text: str) -> object:
    try:
        return json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return None


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")


def _as_call(value: object) -> Call | None:
    if not isinstance(value, dict):
        return None
    fields = cast("dict[str, Any]", value)
    name = fields.get("name")
    arguments: Any = fields.get("arguments", fields.get("parameters", {}))
    if isinstance(arguments, str):
        arguments = _json(arguments)
    if not isinstance(name, str) or not name or not isinstance(arguments, dict):
        return None
    return Call(name, cast("dict[str, Any]", arguments))


class WholeCallsParser:
    """The whole output is calls if it begins like them; else it's words, from its start on."""

    def __init__(self, read: ReadCalls, *, openings: tuple[str, ...]) -> None:
        """`openings` is what calls begin with."""
        self._read = read
        self._openings = openings
        self._held = ""
        self._is_text = False

    def push(self, text: str) -> Parsed:
        if self._is_text:
            return Parsed(content=text)
        self._held += text
        begun = self._held.lstrip()
        if any(begun.startswith(o) or o.startswith(begun) for o in self._openings):
            return Parsed()
        return self._give_up()

    def finish(self) -> Parsed:
        calls = None if self._is_text else self._read(self._held)
        if calls is None:
            return self._give_up()
        self._held = ""
        return Parsed(calls=[call.piece(i) for i, call in enumerate(calls)])

    def _give_up(self) -> Parsed:
        self._is_text = True
        held, self._held = self._held, ""
        return Parsed(content=held)
