"""What a body says about tools: which there are, and whether one is to be called."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import msgspec

from protocol.errors import InvalidRequestError
from protocol.sampling import SamplingParams
from protocol.structured_outputs import StructuredOutputsParams
from services.router.openai.bodies import ChatBody, Tool, ToolChoice
from services.router.openai.chat_fields import required
from services.router.openai.chat_reader import ReadingRules
from services.router.openai.first_call import FirstCallParser
from services.router.openai.listed_calls import ListedCallsParser
from services.router.openai.reasoning_parsers import ThinkParser
from services.router.openai.thoughts import ThoughtPolicy
from services.router.openai.tool_formats import TOOL_FORMATS, ToolFormat
from services.router.openai.tool_parsers import (
    NamedCallParser,
    ToolParser,
)

MAX_TOOLS = 128
_ALLOWED = "tool_choice.allowed_tools"


@dataclass(frozen=True, slots=True)
class ToolUse:
    """How one request uses tools.

    `make_parser` is None if its text is no more than text. `structure` holds the output to calls;
    `keeps_special_tokens` if the marks of calls are among them. `says_tool_calls` is whether calls
    are the finish reason: OpenAI's answer to a named tool says "stop". `ends_with_call`: nothing is
    wanted behind the first call.
    """

    definitions: list[dict[str, Any]] | None = None
    make_parser: Callable[[], ToolParser] | None = None
    structure: StructuredOutputsParams | None = None
    keeps_special_tokens: bool = False
    says_tool_calls: bool = True
    ends_with_call: bool = False


NO_TOOLS = ToolUse()


class ToolPolicy:
    """What this server can do with tools: `tool_format` is None without auto choice."""

    def __init__(self, tool_format: ToolFormat | None) -> None:
        self._format = tool_format

    @classmethod
    def of(cls, parser: str | None, *, enable_auto: bool) -> "ToolPolicy":
        return cls(TOOL_FORMATS[parser] if parser is not None and enable_auto else None)

    def read(self, body: ChatBody) -> ToolUse:
        """Raises InvalidRequestError that names the client's field."""
        choice = body.tool_choice
        if not body.tools:
            if choice in (None, "none", "auto"):
                return NO_TOOLS
            raise InvalidRequestError("`tool_choice` needs `tools`.", field="tool_choice")
        check_tools(body.tools)
        if choice == "none":
            return NO_TOOLS
        several = body.parallel_tool_calls is not False
        if isinstance(choice, ToolChoice):
            if choice.type == "function":
                function = required(choice.function, "tool_choice.function")
                return _named(function.name, body.tools)
            allowed = _allowed(choice, body.tools)
            if required(choice.allowed_tools, _ALLOWED).mode == "required":
                # The grammar keeps it from calling others, so it may know of them: the prompt
                # stays the same, and its blocks cached, whichever are allowed.
                return _required(allowed, tool_definitions(body.tools), several=several)
            return self._auto([*allowed.values()], several=several, is_all=False)
        if choice == "required":
            tools = dict(enumerate(body.tools))
            return _required(tools, tool_definitions(body.tools), several=several)
        return self._auto(body.tools, several=several, is_all=True)

    def _auto(self, tools: list[Tool], *, several: bool, is_all: bool) -> ToolUse:
        """Unless that `is_all`, the model may know of more functions than it's told of here."""
        if self._format is None:
            raise InvalidRequestError(
                'A `tool_choice` of "auto", the default with `tools`, needs a server that was '
                "started with --enable-auto-tool-choice and --tool-call-parser.",
                field="tool_choice",
                code="unsupported_parameter",
            )
        make = partial(self._format.parser, None if is_all else {t.function.name for t in tools})
        closings = self._format.closings
        return ToolUse(
            tool_definitions(tools),
            make_parser=make if several else lambda: FirstCallParser(make, closings),
            keeps_special_tokens=self._format.uses_special_tokens,
            ends_with_call=not several,
        )


@dataclass(frozen=True, slots=True)
class ChatRules:
    """How chats are read on this server: its tools, and how the model marks its thoughts."""

    tools: ToolPolicy
    thoughts: ThoughtPolicy
    make_thoughts: Callable[[], ThinkParser] | None = None

    def reading(
        self, tools: ToolUse, sampling: SamplingParams, *, shows_thoughts: bool = True
    ) -> ReadingRules:
        # A grammar leaves no room for thoughts.
        thinks = sampling.structured_outputs is None
        return ReadingRules(
            make_thoughts=self.make_thoughts if thinks else None,
            shows_thoughts=shows_thoughts,
            make_calls=tools.make_parser,
            says_tool_calls=tools.says_tool_calls,
            ends_with_call=tools.ends_with_call,
        )


def check_tools(tools: list[Tool]) -> None:
    """Raises InvalidRequestError if there are too many, or they can't be told apart."""
    if len(tools) > MAX_TOOLS:
        raise InvalidRequestError(
            f"`tools` may hold at most {MAX_TOOLS} tools, got {len(tools)}.", field="tools"
        )
    names = [tool.function.name for tool in tools]
    for i, name in enumerate(names):
        field = f"tools[{i}].function.name"
        if not name:
            raise InvalidRequestError(f"`{field}` must not be empty.", field=field)
        if name in names[:i]:
            raise InvalidRequestError(f"`{field}` is there twice: {name!r:.80}.", field=field)


def tool_definitions(tools: list[Tool]) -> list[dict[str, Any]]:
    """As templates want them."""
    return [msgspec.to_builtins(tool) for tool in tools]


def _allowed(choice: ToolChoice, tools: list[Tool]) -> dict[int, Tool]:
    """By their places in `tools`. Raises InvalidRequestError if that names none, or one that isn't
    there."""
    wanted = required(choice.allowed_tools, _ALLOWED).tools
    if not wanted:
        text = f"`{_ALLOWED}.tools` must not be empty."
        raise InvalidRequestError(text, field=f"{_ALLOWED}.tools")
    names = {tool.function.name for tool in tools}
    for i, tool in enumerate(wanted):
        if tool.function.name not in names:
            field = f"{_ALLOWED}.tools[{i}].function.name"
            text = f"`{field}` is {tool.function.name!r:.80}, which isn't in `tools`."
            raise InvalidRequestError(text, field=field)
    allowed = {tool.function.name for tool in wanted}
    return {i: tool for i, tool in enumerate(tools) if tool.function.name in allowed}


def _required(
    tools: Mapping[int, Tool], definitions: list[dict[str, Any]], *, several: bool
) -> ToolUse:
    return ToolUse(
        definitions,
        make_parser=ListedCallsParser,
        structure=StructuredOutputsParams(json=_calls_schema(tools, several=several)),
    )


def _named(name: str, tools: list[Tool]) -> ToolUse:
    found = next((tool for tool in tools if tool.function.name == name), None)
    if found is None:
        raise InvalidRequestError(
            f"`tool_choice` names {name!r:.80}, which isn't in `tools`.", field="tool_choice"
        )
    return ToolUse(
        tool_definitions(tools),
        make_parser=lambda: NamedCallParser(name),
        structure=StructuredOutputsParams(json=_parameters(found)),
        says_tool_calls=False,
    )


def _parameters(tool: Tool) -> dict[str, Any]:
    return tool.function.parameters or {"type": "object", "properties": {}}


def _calls_schema(tools: Mapping[int, Tool], *, several: bool) -> dict[str, Any]:
    """One call or more, of `tools` by their places in the body. Definitions of a tool's parameters
    move to where references find them."""
    definitions: dict[str, Any] = {}
    calls: list[dict[str, Any]] = []
    for i, tool in tools.items():
        parameters = dict(_parameters(tool))
        for key in ("$defs", "definitions"):
            own: Any = parameters.pop(key, {})
            if not isinstance(own, dict):
                field = f"tools[{i}].function.parameters.{key}"
                raise InvalidRequestError(f"`{field}` must be an object.", field=field)
            for name, schema in cast("dict[str, Any]", own).items():
                if definitions.setdefault(key, {}).setdefault(name, schema) != schema:
                    raise InvalidRequestError(
                        f"Two `tools` define {name!r:.80} in different ways.", field="tools"
                    )
        calls.append(
            {
                "type": "object",
                "properties": {"name": {"const": tool.function.name}, "parameters": parameters},
                "required": ["name", "parameters"],
                "additionalProperties": False,
            }
        )
    schema = {"type": "array", "items": {"anyOf": calls}, "minItems": 1, **definitions}
    return schema if several else schema | {"maxItems": 1}
