"""As `answer_shapes`, of the APIs that are translations of chats."""

from typing import Any, Literal

import msgspec


class MessagesFault(msgspec.Struct):
    type: str
    message: str


class MessagesErrorAnswer(msgspec.Struct):
    """As `ErrorAnswer`, by /v1/messages."""

    type: Literal["error"]
    error: MessagesFault


class ResponseAnswer(msgspec.Struct):
    """With further fields that repeat the question."""

    id: str
    object: Literal["response"]
    created_at: int
    completed_at: int | None
    status: Literal["queued", "in_progress", "completed", "incomplete", "failed", "cancelled"]
    background: bool
    error: dict[str, Any] | None
    incomplete_details: dict[str, Any] | None
    model: str
    output: list[dict[str, Any]]
    store: bool
    temperature: float
    top_p: float
    usage: dict[str, Any] | None


class ResponseEvent(msgspec.Struct):
    """With fields as its type has them."""

    type: str
    sequence_number: int


class DeletedResponse(msgspec.Struct):
    id: str
    object: Literal["response"]
    deleted: bool


class InputItemList(msgspec.Struct):
    object: Literal["list"]
    data: list[dict[str, Any]]
    first_id: str | None
    last_id: str | None
    has_more: bool


class MessagesUsage(msgspec.Struct):
    input_tokens: int
    cache_creation_input_tokens: int
    cache_read_input_tokens: int
    output_tokens: int


class MessageAnswer(msgspec.Struct):
    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[dict[str, Any]]
    stop_reason: Literal["end_turn", "max_tokens", "tool_use", "stop_sequence"]
    stop_sequence: str | None
    usage: MessagesUsage


class MessageEvent(msgspec.Struct):
    """With fields as its type has them."""

    type: str


class CountedTokens(msgspec.Struct):
    input_tokens: int
