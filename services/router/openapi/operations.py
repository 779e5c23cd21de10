"""Every endpoint of the API in `OPERATIONS`: what goes in, what comes out. `openapi.py` says it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from services.router.admin.admin_api import AbortBody
from services.router.admin.live_settings import LiveSettingsBody
from services.router.batch.answer_shapes import (
    BatchAnswer,
    BatchList,
    DeletedFile,
    FileAnswer,
    FileList,
)
from services.router.batch.batches_api import BatchBody
from services.router.batch.files_api import UPLOAD_SCHEMA
from services.router.embeddings.bodies import EmbeddingBody, RerankBody, ScoreBody
from services.router.messages.bodies import MessagesBody, PromptBody
from services.router.openai.bodies import (
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    TokenizeBody,
)
from services.router.openapi.answer_shapes import (
    AbortedRequests,
    ChangedSettings,
    ChatChunk,
    ChatCompletion,
    Completion,
    CompletionChunk,
    DetokenizedText,
    DroppedBlocks,
    LoadConfig,
    ModelCard,
    ModelList,
    Ranking,
    ServerLoad,
    ServerVersion,
    TextScores,
    TextVectors,
    Tokens,
)
from services.router.openapi.translated_answer_shapes import (
    CountedTokens,
    DeletedResponse,
    InputItemList,
    MessageAnswer,
    MessageEvent,
    ResponseAnswer,
    ResponseEvent,
)
from services.router.responses.bodies import ResponsesBody
from services.router.responses.items import INCLUDABLE

JSON, TEXT, EVENTS = "application/json", "text/plain", "text/event-stream"
FORM, BYTES = "multipart/form-data", "application/octet-stream"

_READS_BODY = (400, 404, 408, 413)
_GENERATES = (*_READS_BODY, 429, 503, 504)
_RESPONSE, _FINDS_RESPONSE = "/v1/responses/{response_id}", (400, 404, 503)


@dataclass(frozen=True, slots=True)
class Operation:
    """A method and path, what goes in and what comes out. Without `answer` a success is empty.

    A type becomes a schema, a dictionary is one. `event` is what the events of a stream hold, where
    one can be asked for instead.
    """

    method: str
    path: str
    summary: str
    answer: Any = None
    body: Any = None
    errors: tuple[int, ...] = ()
    event: Any = None
    answer_type: str = JSON
    body_type: str = JSON
    query: Mapping[str, Any] = field(default_factory=dict[str, Any])


_FILE, _BATCH, _FINDS = "/v1/files/{file_id}", "/v1/batches/{batch_id}", (404, 503)
_BINARY: dict[str, Any] = {"type": "string", "format": "binary"}


_INCLUDED = {"type": "array", "items": {"type": "string", "enum": list(INCLUDABLE)}}


def _pages(max_limit: int) -> dict[str, Any]:
    return {
        "after": {"type": "string"},
        "limit": {"type": "integer", "minimum": 1, "maximum": max_limit},
        "order": {"type": "string", "enum": ["asc", "desc"]},
    }


OPERATIONS = (
    Operation(
        *("POST", "/v1/chat/completions", "Go on with a conversation", ChatCompletion),
        *(ChatBody, _GENERATES, ChatChunk),
    ),
    Operation(
        *("POST", "/v1/completions", "Go on with a text", Completion),
        *(CompletionBody, _GENERATES, CompletionChunk),
    ),
    Operation(
        *("POST", "/v1/responses", "Respond to items", ResponseAnswer),
        *(ResponsesBody, _GENERATES, ResponseEvent),
    ),
    Operation("GET", _RESPONSE, "A response kept", ResponseAnswer, errors=_FINDS_RESPONSE),
    Operation("DELETE", _RESPONSE, "Forget it", DeletedResponse, errors=_FINDS_RESPONSE),
    Operation(
        *("GET", f"{_RESPONSE}/input_items", "What it was made from", InputItemList),
        errors=_FINDS_RESPONSE,
        query=_pages(100) | {"include": _INCLUDED},
    ),
    Operation(
        *("POST", f"{_RESPONSE}/cancel", "End it in the background", ResponseAnswer),
        errors=_FINDS_RESPONSE,
    ),
    Operation(
        *("POST", "/v1/messages", "Go on with messages, as Anthropic's API does", MessageAnswer),
        *(MessagesBody, _GENERATES, MessageEvent),
    ),
    Operation(
        *("POST", "/v1/messages/count_tokens", "How many tokens those are", CountedTokens),
        *(PromptBody, _READS_BODY),
    ),
    Operation("POST", "/v1/embeddings", "Texts' vectors", TextVectors, EmbeddingBody, _GENERATES),
    *(
        Operation("POST", path, "How alike texts are", TextScores, ScoreBody, _GENERATES)
        for path in ("/v1/score", "/score")
    ),
    *(
        Operation("POST", path, "Which documents fit", Ranking, RerankBody, _GENERATES)
        for path in ("/v1/rerank", "/v2/rerank", "/rerank")
    ),
    Operation("POST", "/tokenize", "A text's tokens", Tokens, TokenizeBody, _READS_BODY),
    Operation("POST", "/detokenize", "Tokens' text", DetokenizedText, DetokenizeBody, _READS_BODY),
    Operation(
        *("POST", "/v1/files", "Upload a file of requests", FileAnswer, UPLOAD_SCHEMA),
        (400, 408, 413, 503),
        body_type=FORM,
    ),
    Operation(
        *("GET", "/v1/files", "Files, newest first", FileList),
        errors=(400, 503),
        query=_pages(10_000) | {"purpose": {"type": "string"}},
    ),
    Operation("GET", _FILE, "What is known of a file", FileAnswer, errors=_FINDS),
    Operation("DELETE", _FILE, "Forget a file", DeletedFile, errors=_FINDS),
    Operation(
        *("GET", f"{_FILE}/content", "What is in a file", _BINARY),
        errors=_FINDS,
        answer_type=BYTES,
    ),
    Operation("POST", "/v1/batches", "Run a file", BatchAnswer, BatchBody, (*_READS_BODY, 503)),
    Operation(
        *("GET", "/v1/batches", "Batches, newest first", BatchList),
        errors=(400, 503),
        query=_pages(100),
    ),
    Operation("GET", _BATCH, "What is known of a batch", BatchAnswer, errors=_FINDS),
    Operation("POST", f"{_BATCH}/cancel", "End it", BatchAnswer, errors=(*_FINDS, 409)),
    Operation("GET", "/v1/models", "The names of the model", ModelList),
    Operation("GET", "/v1/models/{name}", "The model under one name", ModelCard, errors=(404,)),
    Operation("GET", "/health", "Whether a request would be served", errors=(503,)),
    Operation("GET", "/ping", "As /health", errors=(503,)),
    Operation("POST", "/ping", "As /health", errors=(503,)),
    Operation("GET", "/version", "The version of the server", ServerVersion),
    Operation("GET", "/load", "How many requests are under way", ServerLoad),
    Operation("GET", "/load_config", "How the server is set up", LoadConfig),
    Operation(
        *("POST", "/load_config", "Change settings", ChangedSettings),
        *(LiveSettingsBody, (400, 408, 413, 503)),
    ),
    Operation("POST", "/reset_prefix_cache", "Drop what is cached", DroppedBlocks, errors=(503,)),
    Operation(
        *("POST", "/abort", "Abort requests", AbortedRequests, AbortBody, (*_READS_BODY, 503)),
    ),
    Operation("GET", "/metrics", "Metrics for Prometheus", str, answer_type=TEXT),
    Operation("GET", "/openapi.json", "This description", dict[str, Any]),
)
