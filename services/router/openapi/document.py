"""The API's description in OpenAPI's terms, made of `operations.py`'s table.

What a body may hold is derived from its type, and from the tables that it's checked against.
"""

from collections.abc import Iterable, Mapping
from typing import Any, cast

import msgspec

from protocol.sampling import RANGES
from services.router.http.auth import is_guarded
from services.router.messages.bodies import PromptBody
from services.router.openai.unsupported import UNSUPPORTED
from services.router.openapi.answer_shapes import ChatChunk, CompletionChunk, ErrorAnswer
from services.router.openapi.operations import EVENTS, JSON, OPERATIONS, Operation
from services.router.openapi.translated_answer_shapes import MessagesErrorAnswer

_MEANINGS = {
    400: "The request is wrong; `param` names the field.",
    401: "There is no valid API key in the request.",
    404: "There is no such model, or whatever the path names.",
    408: "The body didn't come in time.",
    409: "It's too late for that.",
    413: "The body is too long.",
    429: "Too many requests wait already; `Retry-After` says when to try again.",
    503: "No worker can serve the request now.",
    504: "The request took longer than this server allows.",
}
# Fields that a body has under another name than `SamplingParams`.
_RENAMED = {"max_completion_tokens": "max_tokens", "top_logprobs": "logprobs"}


def openapi_document(
    *, version: str, has_keys: bool, operations: Iterable[Operation] = OPERATIONS
) -> dict[str, Any]:
    """`has_keys` if the server lets in only who has one."""
    operations = tuple(operations)
    used = (shape for op in operations for shape in (op.body, op.answer, op.event))
    shapes = {ErrorAnswer, MessagesErrorAnswer, *(s for s in used if not isinstance(s, dict))}
    schemas, components = msgspec.json.schema_components(
        shapes, ref_template="#/components/schemas/{name}"
    )
    for name, schema in components.items():
        if name != PromptBody.__name__:
            # That one takes a message's fields, and looks at those that make the prompt.
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
        success["content"] = {op.answer_type: {"schema": _schema(op.answer, schema_of)}}
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
        content = {op.body_type: {"schema": _schema(op.body, schema_of)}}
        described["requestBody"] = {"required": True, "content": content}
    if is_locked:
        described["security"] = [{"key": []}]
    parameters = [*_path_parameters(op.path), *_query_parameters(op.query)]
    if parameters:
        described["parameters"] = parameters
    return described


def _schema(shape: Any, schema_of: dict[Any, Any]) -> dict[str, Any]:  # noqa: ANN401
    return cast("dict[str, Any]", shape) if isinstance(shape, dict) else schema_of[shape]


def _path_parameters(path: str) -> list[dict[str, Any]]:
    names = [part[1:-1] for part in path.split("/") if part.startswith("{")]
    return [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
        for name in names
    ]


def _query_parameters(query: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [{"name": name, "in": "query", "schema": schema} for name, schema in query.items()]


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
        if name in UNSUPPORTED and schema == {"default": None}:
            schema |= {
                "enum": [None, *UNSUPPORTED[name]],
                "description": "Known, but not supported.",
            }


_LIMITS: dict[str, dict[str, float]] = {
    **{name: {"minimum": low, "maximum": high} for name, low, high, _ in RANGES},
    "top_p": {"exclusiveMinimum": 0, "maximum": 1},
    "repetition_penalty": {"exclusiveMinimum": 0},
}


def _takes_numbers(schema: dict[str, Any]) -> bool:
    return any(kind.get("type") in ("integer", "number") for kind in schema.get("anyOf", ()))
