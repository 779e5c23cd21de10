"""The shapes of answers, for the API's description; the modules that write them are `*_answers.py`.

Fields with `UNSET` are there only where they were asked for, or where there is something to say.
"""

from typing import Any, Literal

import msgspec
from msgspec import UNSET, UnsetType

from services.router.http.errors import ErrorDetail

# One entry a token, the first without: what the prompt's tokens could have been, by token id.
PromptLogprobs = list[dict[str, Any] | None]
FinishReason = Literal["stop", "length", "tool_calls"]


class ErrorAnswer(msgspec.Struct):
    """Every answer that says no."""

    error: ErrorDetail


class CachedTokens(msgspec.Struct):
    cached_tokens: int


class Usage(msgspec.Struct):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens


class TopLogprob(msgspec.Struct):
    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(msgspec.Struct):
    content: list[TokenLogprob]
    refusal: None


class CalledFunction(msgspec.Struct):
    name: str
    arguments: str


class CalledTool(msgspec.Struct):
    id: str
    type: Literal["function"]
    function: CalledFunction


class ChatMessage(msgspec.Struct):
    role: Literal["assistant"]
    content: str | None
    refusal: None
    reasoning_content: str | UnsetType = UNSET
    reasoning: str | UnsetType = UNSET
    tool_calls: list[CalledTool] | UnsetType = UNSET


class Choice(msgspec.Struct, kw_only=True):
    index: int
    finish_reason: FinishReason | None
    stop_reason: str | int | None
    token_ids: list[int] | UnsetType = UNSET


class ChatChoice(Choice, kw_only=True):
    message: ChatMessage
    logprobs: ChatLogprobs | None


class ChatCompletion(msgspec.Struct):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    prompt_token_ids: list[int] | UnsetType = UNSET
    prompt_logprobs: PromptLogprobs | UnsetType = UNSET


class CalledPiece(msgspec.Struct):
    """The first piece of a call has its id and name, the others more of its arguments."""

    index: int
    function: dict[str, str]
    id: str | UnsetType = UNSET
    type: Literal["function"] | UnsetType = UNSET


class ChatDelta(msgspec.Struct):
    role: Literal["assistant"] | UnsetType = UNSET
    content: str | UnsetType = UNSET
    reasoning_content: str | UnsetType = UNSET
    reasoning: str | UnsetType = UNSET
    tool_calls: list[CalledPiece] | UnsetType = UNSET


class ChatChunkChoice(msgspec.Struct):
    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None
    stop_reason: str | int | UnsetType | None = UNSET
    token_ids: list[int] | UnsetType = UNSET


class ChatChunk(msgspec.Struct):
    """The last one has the usage and no choice, where the usage was asked for."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | UnsetType | None = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET


class CompletionLogprobs(msgspec.Struct):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(Choice, kw_only=True):
    text: str
    logprobs: CompletionLogprobs | None
    prompt_token_ids: list[int] | UnsetType = UNSET
    prompt_logprobs: PromptLogprobs | UnsetType = UNSET


class Completion(msgspec.Struct):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage


class CompletionChunkChoice(msgspec.Struct):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason | None
    stop_reason: str | int | UnsetType | None = UNSET
    token_ids: list[int] | UnsetType = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET


class CompletionChunk(msgspec.Struct):
    """As `ChatChunk`."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChunkChoice]
    usage: Usage | UnsetType | None = UNSET


class TextsUsage(msgspec.Struct):
    prompt_tokens: int
    total_tokens: int


class TextVector(msgspec.Struct):
    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class TextVectors(msgspec.Struct):
    id: str
    object: Literal["list"]
    created: int
    model: str
    data: list[TextVector]
    usage: TextsUsage


class TextScore(msgspec.Struct):
    object: Literal["score"]
    index: int
    score: float


class TextScores(msgspec.Struct):
    id: str
    object: Literal["list"]
    created: int
    model: str
    data: list[TextScore]
    usage: TextsUsage


class RankedText(msgspec.Struct):
    text: str


class Rank(msgspec.Struct):
    index: int
    relevance_score: float
    document: RankedText | UnsetType = UNSET


class Ranking(msgspec.Struct):
    id: str
    model: str
    results: list[Rank]
    usage: TextsUsage


class Tokens(msgspec.Struct):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class DetokenizedText(msgspec.Struct):
    prompt: str


class ModelCard(msgspec.Struct):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    parent: None
    max_model_len: int


class ModelList(msgspec.Struct):
    object: Literal["list"]
    data: list[ModelCard]


class ServerVersion(msgspec.Struct):
    version: str


class ServerLoad(msgspec.Struct):
    """`is_whole` if it's of all routers; one that didn't answer has no number."""

    server_load: int
    routers: dict[str, int | None]
    is_whole: bool


class LoadConfig(msgspec.Struct):
    model: str
    max_model_len: int
    settings: dict[str, Any]
    workers: list[dict[str, Any]]


class ChangedSettings(msgspec.Struct):
    settings: dict[str, Any]
    num_routers: int


class DroppedBlocks(msgspec.Struct):
    success: Literal[True]
    num_dropped_blocks: int
    workers: dict[str, int]


class AbortedRequests(msgspec.Struct):
    num_aborted: int
    request_ids: list[str]
    num_routers: int
