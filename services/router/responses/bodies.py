"""The body of /v1/responses: OpenAI's fields and vLLM's extensions.

Items, parts and tools of all types have one form each here, since an item's `type` may be left out
and those that this server can't use are to be refused by name.
"""

from typing import Literal

import msgspec

from services.router.openai.bodies import Json, SharedFields


class InputPart(msgspec.Struct, kw_only=True, omit_defaults=True):
    """A piece of text; `type` says whose."""

    type: str
    text: str | None = None
    refusal: str | None = None


class InputItem(msgspec.Struct, kw_only=True, omit_defaults=True):
    """A message, a function's call or its output, or thoughts."""

    type: str = "message"
    id: str | None = None
    role: Literal["user", "assistant", "system", "developer"] | None = None
    content: str | list[InputPart] | None = None
    call_id: str | None = None
    name: str | None = None
    arguments: str | None = None
    output: str | list[InputPart] | None = None
    summary: list[InputPart] | None = None


class ResponsesTool(msgspec.Struct, kw_only=True):
    type: str
    name: str | None = None
    description: str | None = None
    parameters: dict[str, Json] | None = None
    strict: bool | None = None


class AllowedResponsesTool(msgspec.Struct, kw_only=True):
    type: str
    name: str | None = None


class ResponsesToolChoice(msgspec.Struct, kw_only=True, omit_defaults=True):
    """A function, or some of `tools` with a mode."""

    type: str
    name: str | None = None
    mode: Literal["auto", "required"] | None = None
    tools: list[AllowedResponsesTool] | None = None


class TextFormat(msgspec.Struct, kw_only=True, omit_defaults=True):
    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: str | None = None
    schema: dict[str, Json] | None = None
    strict: bool | None = None


class TextOptions(msgspec.Struct, kw_only=True):
    format: TextFormat | None = None
    verbosity: str | None = None


class ReasoningOptions(msgspec.Struct, kw_only=True):
    """Thoughts are answered whole, so there's no need for a `summary`."""

    effort: str | None = None
    summary: str | None = None


class ResponsesBody(SharedFields, kw_only=True):
    """None is the model's or the protocol's default. The last ones have no effect here; see
    `refuse_fields` for what becomes of them."""

    input: str | list[InputItem]
    instructions: str | None = None
    max_output_tokens: int | None = None
    previous_response_id: str | None = None
    background: bool | None = None
    store: bool | None = None
    metadata: dict[str, str] | None = None
    tools: list[ResponsesTool] | None = None
    tool_choice: Literal["none", "auto", "required"] | ResponsesToolChoice | None = None
    parallel_tool_calls: bool | None = None
    text: TextOptions | None = None
    reasoning: ReasoningOptions | None = None
    include: list[str] | None = None
    top_logprobs: int | None = None
    truncation: Literal["auto", "disabled"] | None = None
    stop: str | list[str] | None = None
    user: str | None = None
    thinking_token_budget: int | None = None
    chat_template_kwargs: dict[str, Json] | None = None

    context_management: Json = None
    conversation: Json = None
    max_tool_calls: Json = None
    moderation: Json = None
    prompt: Json = None
    service_tier: Json = None
