"""The bodies of /v1/messages and /v1/messages/count_tokens: Anthropic's fields, vLLM's extensions.

Content of all types has one form here, since what this server can't use is to be refused by name.
"""

from typing import Literal

import msgspec

from services.router.openai.bodies import Json, SharedFields


class Content(msgspec.Struct, kw_only=True):
    """A text, thoughts, a tool's use or its result, which has `content` of its own."""

    type: str
    text: str | None = None
    thinking: str | None = None
    id: str | None = None
    name: str | None = None
    input: dict[str, Json] | None = None
    tool_use_id: str | None = None
    content: "str | list[Content] | None" = None


class TurnBody(msgspec.Struct, kw_only=True):
    role: Literal["user", "assistant", "system"]
    content: str | list[Content]


class MessagesTool(msgspec.Struct, kw_only=True):
    """Without `type`, or with "custom", it's a client's own."""

    type: str | None = None
    name: str | None = None
    description: str | None = None
    input_schema: dict[str, Json] | None = None
    strict: bool | None = None


class MessagesToolChoice(msgspec.Struct, kw_only=True):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class ThinkingOptions(msgspec.Struct, kw_only=True):
    """Goes to the chat template as `enable_thinking`. Where the model has no tokens that mark
    thoughts, `max_tokens` alone bounds them."""

    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: int | None = None


class OutputFormat(msgspec.Struct, kw_only=True):
    type: Literal["json_schema"]
    schema: dict[str, Json]


class OutputOptions(msgspec.Struct, kw_only=True):
    effort: str | None = None
    format: OutputFormat | None = None


class RequestMetadata(msgspec.Struct, kw_only=True):
    user_id: str | None = None


class PromptBody(SharedFields, kw_only=True):
    """What is sent to the model. The last two are refused."""

    messages: list[TurnBody]
    system: str | list[Content] | None = None
    tools: list[MessagesTool] | None = None
    tool_choice: MessagesToolChoice | None = None
    thinking: ThinkingOptions | None = None
    output_config: OutputOptions | None = None
    chat_template_kwargs: dict[str, Json] | None = None
    container: Json = None
    mcp_servers: Json = None


class MessagesBody(PromptBody, kw_only=True):
    max_tokens: int
    stop_sequences: list[str] | None = None
    metadata: RequestMetadata | None = None
