"""The API's description in OpenAPI's terms: one line for each endpoint in `OPERATIONS`.

What a body may hold is derived from its type, and from the tables that it's checked against.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import msgspec

from protocol.sampling import RANGES
from services.router.answer_shapes import (
    ChatChunk,
    ChatCompletion,
    Completion,
    CompletionChunk,
    DetokenizedText,
    ErrorAnswer,
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
from services.router.auth import is_guarded
from services.router.embeddings_bodies import EmbeddingBody, RerankBody, ScoreBody
from services.router.messages_bodies import MessagesBody, PromptBody
from services.router.openai_bodies import (
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    TokenizeBody,
    Unsupported,
)
from services.router.responses_bodies import ResponsesBody
from services.router.translated_answer_shapes import (
    CountedTokens,
    DeletedResponse,
    MessageAnswer,
    MessageEvent,
    MessagesErrorAnswer,
    ResponseAnswer,
    ResponseEvent,
)
from services.router.unsupported import HARMLESS

JSON, TEXT, EVENTS = "application/json", "text/plain", "text/event-stream"

_READS_BODY = (400, 404, 408, 413)
_GENERATES = (*_READS_BODY, 429, 503, 504)
_RESPONSE, _FINDS_RESPONSE = "/v1/responses/{response_id}", (400, 404, 503)
_MEANINGS = {
    400: "The request is wrong; `param` names the field.",
    401: "There is no valid API key in the request.",
    404: "There is no such model, or whatever the path names.",
    408: "The body didn't come in time.",
    413: "The body is too long.",
    429: "Too many requests wait already; `Retry-After` says when to try again.",
    503: "No worker can serve the request now.",
    504: "The request took longer than this server allows.",
}
# Fields that a body has under another name than `SamplingParams`.
_RENAMED = {"max_completion_tokens": "max_tokens", "top_logprobs": "logprobs"}


@dataclass(frozen=True, slots=True)
class Operation:
    """A method and path, what goes in and what comes out. Without `answer` a success is empty.

    A type becomes a schema; `event` is what a stream's events hold that can be asked for instead.
    """

    method: str
    path: str
    summary: str
    answer: Any = None
    body: type[msgspec.Struct] | None = None
    errors: tuple[int, ...] = ()
    event: Any = None
    answer_type: str = JSON
    body_type: str = JSON


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
    Operation("GET", "/v1/models", "The names of the model", ModelList),
    Operation("GET", "/v1/models/{name}", "The model under one name", ModelCard, errors=(404,)),
    Operation("GET", "/health", "Whether a request would be served", errors=(503,)),
    Operation("GET", "/ping", "As /health", errors=(503,)),
    Operation("POST", "/ping", "As /health", errors=(503,)),
    Operation("GET", "/version", "The version of the server", ServerVersion),
    Operation("GET", "/load", "How many requests are under way", ServerLoad),
    Operation("GET", "/load_config", "How the server is set up", LoadConfig),
    Operation("GET", "/metrics", "Metrics for Prometheus", str, answer_type=TEXT),
    Operation("GET", "/openapi.json", "This description", dict[str, Any]),
)


def openapi_document(
    *, version: str, has_keys: bool, operations: Iterable[Operation] = OPERATIONS
) -> dict[str, Any]:
    """`has_keys` if the server lets in only who has one."""
    operations = tuple(operations)
    shapes = {ErrorAnswer, MessagesErrorAnswer}
    shapes |= {shape for op in operations for shape in (op.body, op.answer, op.event)}
    schemas, components = msgspec.json.schema_components(
        shapes, ref_template="#/components/schemas/{name}"
    )
    for schema in components.values():
        _say_what_is_checked(schema.get("properties", {}))
    schema_of = dict(zip(shapes, schemas, strict=True))
    paths: dict[str, dict[str, Any]] = {}
    for op in operations:
        is_locked = has_keys and is_guarded(op.path)
        paths.setdefault(op.path, {})[op.method.lower()] = _described(op, schema_of, is_locked)
    if has_keys:
        components = {"schemas": components, "securitySchemes": {"key": _BEARER}}
    else:
        components = {"schemas": components}
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Tandem",
            "version": version,
            "description": "Other paths are answered with 404 and other methods with 405, "
            "their body an `ErrorAnswer` too.",
        },
        "paths": paths,
        "components": components,
    }


_BEARER = {"type": "http", "scheme": "bearer"}


def _described(op: Operation, schema_of: dict[Any, Any], is_locked: bool) -> dict[str, Any]:  # noqa: FBT001
    errors = sorted({*op.errors, 401} if is_locked else op.errors)
    is_messages = op.path.startswith("/v1/messages")
    error_schema = schema_of[MessagesErrorAnswer if is_messages else ErrorAnswer]
    refusal = {JSON: {"schema": error_schema}}
    success: dict[str, Any] = {"description": "Success"}
    if op.answer is not None:
        success["content"] = {op.answer_type: {"schema": schema_of[op.answer]}}
        if op.event is not None:
            success["content"][EVENTS] = {
                "schema": _events(
                    {"anyOf": [schema_of[op.event], error_schema]},
                    has_end=op.event in (ChatChunk, CompletionChunk),
                )
            }
    described: dict[str, Any] = {
        "summary": op.summary,
        "responses": {
            "200": success,
            **{
                str(status): {"description": _MEANINGS[status], "content": refusal}
                for status in errors
            },
        },
    }
    if op.body is not None:
        content = {op.body_type: {"schema": schema_of[op.body]}}
        described["requestBody"] = {"required": True, "content": content}
    if is_locked:
        described["security"] = [{"key": []}]
    names = [part[1:-1] for part in op.path.split("/") if part.startswith("{")]
    if names:
        described["parameters"] = [
            {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
            for name in names
        ]
    return described


def _events(schema: dict[str, Any], *, has_end: bool) -> dict[str, Any]:
    """What each event of a stream looks like; if it `has_end`, its last one says no more."""
    json = {"type": "string", "contentMediaType": JSON, "contentSchema": schema}
    data = {"anyOf": [{"const": "[DONE]"}, json]} if has_end else json
    return {"type": "object", "properties": {"data": data}, "required": ["data"]}


def _say_what_is_checked(properties: dict[str, Any]) -> None:
    """Adds to a body's fields what their types don't say."""
    for name, schema in properties.items():
        limits = _LIMITS.get(_RENAMED.get(name, name))
        if limits is not None and _takes_numbers(schema):
            schema |= limits
        if name in Unsupported.__struct_fields__ and schema == {"default": None}:
            schema |= {
                "enum": [None, *HARMLESS.get(name, ())],
                "description": "Known, but not supported.",
            }


_LIMITS: dict[str, dict[str, float]] = {
    **{name: {"minimum": low, "maximum": high} for name, low, high, _ in RANGES},
    "top_p": {"exclusiveMinimum": 0, "maximum": 1},
    "repetition_penalty": {"exclusiveMinimum": 0},
}


def _takes_numbers(schema: dict[str, Any]) -> bool:
    return any(kind.get("type") in ("integer", "number") for kind in schema.get("anyOf", ()))
