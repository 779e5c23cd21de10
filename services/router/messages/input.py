"""From the bodies of /v1/messages to that of a chat."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from protocol.errors import InvalidRequestError
from services.router.messages.bodies import (
    Content,
    MessagesBody,
    MessagesTool,
    MessagesToolChoice,
    PromptBody,
    TurnBody,
)
from services.router.openai.bodies import (
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

# How errors name the fields that a chat's body has under another name or at another place.
FIELD_NAMES: Mapping[str, str] = {
    "stop": "stop_sequences",
    "response_format": "output_config.format",
    r"tools\[(\d+)\]\.function": r"tools[\1]",
    "reasoning_effort": "output_config.effort",
    "continue_final_message": "messages",
    "thinking_token_budget": "thinking.budget_tokens",
}

_HARMLESS: Mapping[str, tuple[Any, ...]] = {"container": (), "mcp_servers": ([],)}
_TOOL_CHOICES: Mapping[str, Literal["auto", "required", "none"]] = {
    "auto": "auto",
    "any": "required",
    "none": "none",
}


def chat_body(body: MessagesBody) -> ChatBody:
    """Raises InvalidRequestError that names the field."""
    chat = prompt_chat_body(body)
    chat.max_tokens = body.max_tokens
    chat.stop = body.stop_sequences
    return chat


def prompt_chat_body(body: PromptBody) -> ChatBody:
    """As `chat_body`, for all that goes into the prompt."""
    refuse_fields(body, _HARMLESS)
    choice, output = body.tool_choice, body.output_config
    messages = _messages(body)
    chat = ChatBody(
        **shared_fields(body),
        chat_template_kwargs=body.chat_template_kwargs,
        messages=messages,
        tools=None if body.tools is None else [_tool(t, i) for i, t in enumerate(body.tools)],
        tool_choice=None if choice is None else _tool_choice(choice),
        parallel_tool_calls=None if choice is None else not choice.disable_parallel_tool_use,
        reasoning_effort=None if output is None else output.effort,
        # The answer goes on where the assistant's last words end.
        continue_final_message=bool(messages) and _is_begun(messages[-1]),
    )
    if output is not None and output.format is not None:
        schema = NamedSchema(schema=output.format.schema)
        chat.response_format = ResponseFormat(type="json_schema", json_schema=schema)
    if body.thinking is not None:
        thinks = body.thinking.type != "disabled"
        chat.thinking_token_budget = body.thinking.budget_tokens if thinks else None
        chat.chat_template_kwargs = {"enable_thinking": thinks} | (body.chat_template_kwargs or {})
    return chat


def _is_begun(message: Message) -> bool:
    return message.role == "assistant" and bool(message.content) and not message.tool_calls


def _messages(body: PromptBody) -> list[Message]:
    messages: list[Message] = []
    if body.system is not None:
        messages.append(Message(role="system", content=_texts(body.system, "system")))
    for i, turn in enumerate(body.messages):
        path = f"messages[{i}].content"
        if isinstance(turn.content, str):
            messages.append(Message(role=turn.role, content=turn.content))
        elif turn.role == "assistant":
            messages.append(_assistants(turn.content, path))
        else:
            messages += _users(turn, turn.content, path)
    return messages


def _users(turn: TurnBody, contents: Sequence[Content], path: str) -> list[Message]:
    """Results of tools are messages of their own, in the order in which all is said."""
    messages: list[Message] = []
    for j, content in enumerate(contents):
        if content.type == "tool_result":
            inner = f"{path}[{j}]"
            result = _texts(content.content or "", f"{inner}.content")
            call_id = required(content.tool_use_id, f"{inner}.tool_use_id")
            messages.append(Message(role="tool", content=result, tool_call_id=call_id))
            continue
        text = _text(content, f"{path}[{j}]")
        if messages and messages[-1].role == turn.role:
            messages[-1].content = f"{messages[-1].content}\n{text}"
        else:
            messages.append(Message(role=turn.role, content=text))
    return messages


def _assistants(contents: Sequence[Content], path: str) -> Message:
    texts: list[str] = []
    thoughts: list[str] = []
    calls: list[ToolCall] = []
    for j, content in enumerate(contents):
        inner = f"{path}[{j}]"
        match content.type:
            case "tool_use":
                calls.append(_call(content, inner))
            case "thinking":
                thoughts.append(required(content.thinking, f"{inner}.thinking"))
            case "redacted_thinking":
                pass  # another server's thoughts, which nobody else can read
            case _:
                texts.append(_text(content, inner))
    return Message(
        role="assistant",
        content="\n".join(texts),
        reasoning_content="\n".join(thoughts) or None,
        tool_calls=calls or None,
    )


def _call(content: Content, path: str) -> ToolCall:
    function = FunctionCall(
        name=required(content.name, f"{path}.name"),
        arguments=required(content.input, f"{path}.input"),
    )
    return ToolCall(id=required(content.id, f"{path}.id"), function=function)


def _texts(contents: str | Sequence[Content], path: str) -> str:
    if isinstance(contents, str):
        return contents
    return "\n".join(_text(content, f"{path}[{j}]") for j, content in enumerate(contents))


def _text(content: Content, path: str) -> str:
    if content.type != "text":
        raise InvalidRequestError(
            f"`{path}` has type {content.type[:40]!r}, which this server doesn't take here.",
            field=f"{path}.type",
        )
    return required(content.text, f"{path}.text")


def _tool(tool: MessagesTool, index: int) -> Tool:
    path = f"tools[{index}]"
    if tool.type not in (None, "custom"):
        raise unsupported(f"{path}.type", f"The built-in tool {tool.type[:40]!r}")
    return Tool(
        function=FunctionDefinition(
            name=required(tool.name, f"{path}.name"),
            description=tool.description,
            parameters=required(tool.input_schema, f"{path}.input_schema"),
            strict=tool.strict,
        )
    )


def _tool_choice(
    choice: MessagesToolChoice,
) -> Literal["none", "auto", "required"] | ToolChoice:
    if choice.type == "tool":
        name = required(choice.name, "tool_choice.name")
        return ToolChoice(function=FunctionName(name=name))
    return _TOOL_CHOICES[choice.type]
