"""From the body of /v1/responses to that of a chat."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from protocol.errors import InvalidRequestError
from protocol.sampling import MAX_LOGPROBS
from services.router.openai.bodies import (
    AllowedTool,
    AllowedTools,
    ChatBody,
    FunctionCall,
    FunctionDefinition,
    FunctionName,
    Message,
    NamedSchema,
    ResponseFormat,
    Tool,
    ToolCall,
    ToolChoice,
)
from services.router.openai.chat_fields import required, shared_fields
from services.router.openai.unsupported import refuse_fields, unsupported
from services.router.responses.bodies import (
    AllowedResponsesTool,
    InputItem,
    InputPart,
    ResponsesBody,
    ResponsesTool,
    TextFormat,
)

LOGPROBS = "message.output_text.logprobs"
# Thoughts come and go in plain text here, which serves those who ask for this.
ENCRYPTED_THOUGHTS = "reasoning.encrypted_content"

# How errors name the fields that a chat's body has under another name or at another place.
FIELD_NAMES: Mapping[str, str] = {
    "messages": "input",
    "max_completion_tokens": "max_output_tokens",
    r"response_format\.json_schema": "text.format.schema",
    "response_format": "text.format",
    r"tools\[(\d+)\]\.function": r"tools[\1]",
    r"tool_choice\.allowed_tools\.tools\[(\d+)\]\.function": r"tool_choice.tools[\1]",
    r"tool_choice\.allowed_tools": "tool_choice",
    "reasoning_effort": "reasoning.effort",
    "logprobs": "include",
}

_HARMLESS: Mapping[str, tuple[Any, ...]] = {
    "context_management": ([],),
    "conversation": (),
    "max_tool_calls": (),
    "moderation": (),
    "prompt": (),
    "service_tier": ("auto", "default"),
}


def chat_body(body: ResponsesBody, messages: Sequence[Message]) -> ChatBody:
    """`messages` are the whole conversation. Raises InvalidRequestError that names the field."""
    instructions: list[Message] = []
    if body.instructions is not None:
        instructions.append(Message(role="system", content=body.instructions))
    with_logprobs = LOGPROBS in (body.include or ())
    if body.top_logprobs is not None and not 0 <= body.top_logprobs <= MAX_LOGPROBS:
        raise InvalidRequestError(
            f"`top_logprobs` must be between 0 and {MAX_LOGPROBS}, got {body.top_logprobs}.",
            field="top_logprobs",
        )
    text, reasoning = body.text, body.reasoning
    return ChatBody(
        **shared_fields(body),
        chat_template_kwargs=body.chat_template_kwargs,
        messages=[*instructions, *messages],
        max_completion_tokens=body.max_output_tokens,
        stop=body.stop,
        tools=None if body.tools is None else [_tool(t, i) for i, t in enumerate(body.tools)],
        tool_choice=_tool_choice(body),
        parallel_tool_calls=body.parallel_tool_calls,
        response_format=None if text is None or text.format is None else _format(text.format),
        reasoning_effort=None if reasoning is None else reasoning.effort,
        thinking_token_budget=body.thinking_token_budget,
        logprobs=with_logprobs,
        top_logprobs=body.top_logprobs if with_logprobs else None,
    )


def refuse_unsupported_response(body: ResponsesBody) -> None:
    """Raises InvalidRequestError that names the first field that asks for something missing."""
    refuse_fields(body, _HARMLESS)
    for i, wanted in enumerate(body.include or ()):
        if wanted not in (LOGPROBS, ENCRYPTED_THOUGHTS):
            raise unsupported(f"include[{i}]", f"To include {wanted[:60]!r}")
    if body.text is not None and body.text.verbosity not in (None, "medium"):
        raise unsupported("text.verbosity")


def shortened(conversation: Sequence[Message]) -> list[list[Message]]:
    """The conversation without ever more of its oldest turns, down to the last one.

    A turn begins with the user's message. What the system says stays.
    """
    starts = [i for i, message in enumerate(conversation) if message.role == "user"]
    shorter: list[list[Message]] = []
    num_left_out = 1
    while num_left_out < len(starts):
        start = starts[num_left_out]
        kept = [m for m in conversation[:start] if m.role in ("system", "developer")]
        shorter.append([*kept, *conversation[start:]])
        # Doubled, as each attempt costs an encoding; but the last turn gets its chance.
        is_last = num_left_out == len(starts) - 1
        num_left_out = len(starts) if is_last else min(2 * num_left_out, len(starts) - 1)
    return shorter


def input_messages(given: str | Sequence[InputItem]) -> list[Message]:
    """The messages that a chat would have. Raises InvalidRequestError."""
    if isinstance(given, str):
        return [Message(role="user", content=given)]
    if not given:
        raise InvalidRequestError("`input` must not be empty.", field="input")
    messages: list[Message] = []
    for i, item in enumerate(given):
        _add_item(messages, item, f"input[{i}]")
    return messages


def _add_item(messages: list[Message], item: InputItem, path: str) -> None:
    """Thoughts, words and calls of one turn become one message of the assistant."""
    match item.type:
        case "message":
            role, content = required(item.role, f"{path}.role"), _content(item, path)
            turn = _assistant(messages) if role == "assistant" else None
            if turn is not None and not turn.content and not turn.tool_calls:
                turn.content = content
            else:
                messages.append(Message(role=role, content=content))
        case "reasoning":
            thoughts = _texts(item.content, f"{path}.content") or _texts(
                item.summary, f"{path}.summary"
            )
            if thoughts:
                messages.append(Message(role="assistant", content="", reasoning_content=thoughts))
        case "function_call":
            _add_call(messages, item, path)
        case "function_call_output":
            output = _texts(required(item.output, f"{path}.output"), f"{path}.output")
            call_id = required(item.call_id, f"{path}.call_id")
            messages.append(Message(role="tool", content=output, tool_call_id=call_id))
        case _:
            raise unsupported(f"{path}.type", f"An item of type {item.type[:40]!r}")


def _add_call(messages: list[Message], item: InputItem, path: str) -> None:
    call = ToolCall(
        id=required(item.call_id, f"{path}.call_id"),
        function=FunctionCall(
            name=required(item.name, f"{path}.name"),
            arguments=required(item.arguments, f"{path}.arguments"),
        ),
    )
    turn = _assistant(messages)
    if turn is None:
        turn = Message(role="assistant", content="")
        messages.append(turn)
    turn.tool_calls = [*(turn.tool_calls or ()), call]


def _assistant(messages: list[Message]) -> Message | None:
    """The last message if it's the assistant's."""
    return messages[-1] if messages and messages[-1].role == "assistant" else None


def _content(item: InputItem, path: str) -> str:
    return _texts(required(item.content, f"{path}.content"), f"{path}.content")


def _texts(parts: str | Sequence[InputPart] | None, path: str) -> str:
    if parts is None or isinstance(parts, str):
        return parts or ""
    return "\n".join(_text(part, f"{path}[{j}]") for j, part in enumerate(parts))


def _text(part: InputPart, path: str) -> str:
    match part.type:
        case "input_text" | "output_text" | "text" | "reasoning_text" | "summary_text":
            return required(part.text, f"{path}.text")
        case "refusal":
            return required(part.refusal, f"{path}.refusal")
        case _:
            raise InvalidRequestError(
                f"`{path}` has type {part.type[:40]!r}; this model takes text only.",
                field=f"{path}.type",
            )


def _tool(tool: ResponsesTool, index: int) -> Tool:
    path = f"tools[{index}]"
    if tool.type != "function":
        raise unsupported(f"{path}.type", f"The built-in tool {tool.type[:40]!r}")
    return Tool(
        function=FunctionDefinition(
            name=required(tool.name, f"{path}.name"),
            description=tool.description,
            parameters=tool.parameters,
            strict=tool.strict,
        )
    )


def _tool_choice(body: ResponsesBody) -> Literal["none", "auto", "required"] | ToolChoice | None:
    choice = body.tool_choice
    if choice is None or isinstance(choice, str):
        return choice
    match choice.type:
        case "function":
            name = required(choice.name, "tool_choice.name")
            return ToolChoice(function=FunctionName(name=name))
        case "allowed_tools":
            tools = required(choice.tools, "tool_choice.tools")
            allowed = AllowedTools(
                mode=required(choice.mode, "tool_choice.mode"),
                tools=[_allowed_tool(tool, i) for i, tool in enumerate(tools)],
            )
            return ToolChoice(type="allowed_tools", allowed_tools=allowed)
        case _:
            raise unsupported("tool_choice.type", f"A choice of type {choice.type[:40]!r}")


def _allowed_tool(tool: AllowedResponsesTool, index: int) -> AllowedTool:
    path = f"tool_choice.tools[{index}]"
    if tool.type != "function":
        raise unsupported(f"{path}.type", f"The built-in tool {tool.type[:40]!r}")
    return AllowedTool(function=FunctionName(name=required(tool.name, f"{path}.name")))


def _format(wanted: TextFormat) -> ResponseFormat:
    schema = None
    if wanted.schema is not None:
        schema = NamedSchema(
            schema=wanted.schema,
            name=wanted.name,
            description=wanted.description,
            strict=wanted.strict,
        )
    return ResponseFormat(type=wanted.type, json_schema=schema)
