"""How families of models write tool calls."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

from services.router.openai.tool_parsers import (
    Call,
    MarkedCallsParser,
    ReadCalls,
    ToolParser,
    WholeCallsParser,
    read_json_call,
    read_json_calls,
    read_pythonic_calls,
)


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """How a family of models writes calls. `make` looks for them in a text, `read` takes what it
    finds. `uses_special_tokens`: its marks are among them. Where calls reach to the output's end,
    `closings` are what may follow the last."""

    read: ReadCalls
    make: Callable[[ReadCalls], ToolParser]
    uses_special_tokens: bool = False
    closings: tuple[str, ...] = ()

    def parser(self, allowed: Collection[str] | None = None) -> ToolParser:
        """Where names are `allowed`, calls of other functions are words."""
        return self.make(self.read if allowed is None else _only(allowed, self.read))


def _only(allowed: Collection[str], read: ReadCalls) -> ReadCalls:
    def read_allowed(text: str) -> list[Call] | None:
        calls = read(text)
        return calls if calls and all(call.name in allowed for call in calls) else None

    return read_allowed


def _marked(opening: str, closing: str = "") -> Callable[[ReadCalls], ToolParser]:
    return lambda read: MarkedCallsParser(read, opening=opening, closing=closing)


def _whole(*openings: str) -> Callable[[ReadCalls], ToolParser]:
    return lambda read: WholeCallsParser(read, openings=openings)


def _read_llama3(text: str) -> list[Call] | None:
    return read_json_calls(text.strip().removeprefix("<|python_tag|>"))


_HERMES = ToolFormat(
    read_json_call, _marked("<tool_call>", "</tool_call>"), uses_special_tokens=True
)
_TO_THE_END = ("", "]")
TOOL_FORMATS: Mapping[str, ToolFormat] = {
    "hermes": _HERMES,
    "qwen": _HERMES,
    "llama3_json": ToolFormat(
        *(_read_llama3, _whole("{", "<|python_tag|>")),
        uses_special_tokens=True,
        closings=_TO_THE_END,
    ),
    "mistral": ToolFormat(
        *(read_json_calls, _marked("[TOOL_CALLS]")),
        uses_special_tokens=True,
        closings=_TO_THE_END,
    ),
    "granite": ToolFormat(
        *(read_json_calls, _marked("<|tool_call|>")),
        uses_special_tokens=True,
        closings=_TO_THE_END,
    ),
    "pythonic": ToolFormat(read_pythonic_calls, _whole("["), closings=("]",)),
}
