"""The HTTP surface: which path goes where, and how errors leave."""

import re
from dataclasses import dataclass
from typing import Any

import msgspec
from fastapi import FastAPI, Request, Response
from fastapi.openapi.utils import get_openapi
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.routing import Route

from protocol.errors import TandemError
from services.router.admin_api import AbortBody
from services.router.auth import ApiKeyGuard
from services.router.batch.batches_api import BatchBody
from services.router.batch.files_api import UPLOAD_SCHEMA
from services.router.embeddings_api import EmbeddingsApi
from services.router.embeddings_bodies import EmbeddingBody, RerankBody, ScoreBody
from services.router.http_errors import INTERNAL_ERROR, ErrorReply, HttpError, error_reply
from services.router.live_settings import LiveSettingsBody
from services.router.messages_api import MessagesApi
from services.router.messages_bodies import MessagesBody, PromptBody
from services.router.openai_api import CLIENT_CLOSED_REQUEST, OpenAIApi
from services.router.openai_bodies import ChatBody, CompletionBody, DetokenizeBody, TokenizeBody
from services.router.responses_api import ResponsesApi
from services.router.responses_bodies import ResponsesBody
from services.router.status_api import VERSION, StatusApi

_BODIES: dict[str, type[msgspec.Struct]] = {
    "/v1/chat/completions": ChatBody,
    "/v1/completions": CompletionBody,
    "/v1/responses": ResponsesBody,
    "/v1/messages": MessagesBody,
    "/v1/messages/count_tokens": PromptBody,
    "/v1/embeddings": EmbeddingBody,
    "/v1/score": ScoreBody,
    "/score": ScoreBody,
    "/v1/rerank": RerankBody,
    "/v2/rerank": RerankBody,
    "/rerank": RerankBody,
    "/tokenize": TokenizeBody,
    "/detokenize": DetokenizeBody,
    "/v1/batches": BatchBody,
    "/load_config": LiveSettingsBody,
    "/abort": AbortBody,
}
_OK = {"responses": {"200": {"description": "Successful Response"}}}
# Of paths without a JSON body, which are plain routes for all that.
_PLAIN_PATHS: dict[str, dict[str, Any]] = {
    "/v1/files": {
        "post": _OK
        | {
            "requestBody": {
                "required": True,
                "content": {"multipart/form-data": {"schema": UPLOAD_SCHEMA}},
            }
        },
        "get": _OK,
    },
    "/v1/files/{file_id}": {"get": _OK, "delete": _OK},
    "/v1/files/{file_id}/content": {"get": _OK},
    "/v1/batches": {"get": _OK},
    "/v1/batches/{batch_id}": {"get": _OK},
    "/v1/batches/{batch_id}/cancel": {"post": _OK},
    "/reset_prefix_cache": {"post": _OK},
}


@dataclass(frozen=True, slots=True)
class Apis:
    """All that answers requests."""

    openai: OpenAIApi
    responses: ResponsesApi
    messages: MessagesApi
    embeddings: EmbeddingsApi
    status: StatusApi


def make_app(
    apis: Apis,
    *,
    api_keys: tuple[str, ...] = (),
    allowed_origins: tuple[str, ...] = (),
) -> FastAPI:
    """Without `api_keys` everybody is let in; without `allowed_origins` no other site's pages."""
    app = FastAPI(title="Tandem", version=VERSION, openapi_url=None, docs_url=None, redoc_url=None)
    _add_routes(app, apis)
    for kind in (TandemError, HTTPException, ClientDisconnect, Exception):
        app.add_exception_handler(kind, _answer_error)
    if api_keys:
        app.add_middleware(ApiKeyGuard, keys=api_keys)
    if allowed_origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=allowed_origins, allow_methods=["*"], allow_headers=["*"]
        )
    return app


def _add_routes(app: FastAPI, apis: Apis) -> None:
    openai, embeddings, status = apis.openai, apis.embeddings, apis.status
    posts = {
        "/v1/chat/completions": openai.chat,
        "/v1/completions": openai.completions,
        "/v1/responses": apis.responses.create,
        "/v1/messages": apis.messages.create,
        "/v1/messages/count_tokens": apis.messages.count_tokens,
        "/v1/embeddings": embeddings.embeddings,
        "/v1/score": embeddings.score,
        "/score": embeddings.score,
        "/v1/rerank": embeddings.rerank,
        "/v2/rerank": embeddings.rerank,
        "/rerank": embeddings.rerank,
        "/tokenize": status.tokenize,
        "/detokenize": status.detokenize,
    }
    for path, endpoint in posts.items():
        # Plain routes: FastAPI has nothing to parse here, and costs a request as much again.
        app.router.routes.append(Route(path, endpoint, methods=["POST"]))
    gets = {
        "/v1/models": status.models,
        "/v1/models/{name:path}": status.one_model,
        "/v1/responses/{response_id}": apis.responses.retrieve,
        "/health": status.health,
        "/ping": status.health,
        "/version": status.version,
        "/load": status.load,
        "/load_config": status.load_config,
        "/metrics": status.metrics,
    }
    for path, endpoint in gets.items():
        app.add_api_route(path, endpoint, methods=["GET"], response_model=None)
    app.add_api_route(
        "/v1/responses/{response_id}",
        apis.responses.delete,
        methods=["DELETE"],
        response_model=None,
    )
    app.add_api_route("/ping", status.health, methods=["POST"], response_model=None)
    schema = _openapi_schema(app)

    async def openapi() -> dict[str, Any]:
        return schema

    app.add_api_route("/openapi.json", openapi, methods=["GET"], include_in_schema=False)


def _openapi_schema(app: FastAPI) -> dict[str, Any]:
    """FastAPI's own, with the paths whose bodies are described by msgspec."""
    schema = get_openapi(title=app.title, version=app.version, routes=app.routes)
    bodies, components = msgspec.json.schema_components(
        _BODIES.values(), ref_template="#/components/schemas/{name}"
    )
    schema.setdefault("components", {}).setdefault("schemas", {}).update(components)
    for path, body in zip(_BODIES, bodies, strict=True):
        content = {"application/json": {"schema": body}}
        schema["paths"].setdefault(path, {})["post"] = _OK | {
            "requestBody": {"required": True, "content": content}
        }
    for path, operations in _PLAIN_PATHS.items():
        schema["paths"].setdefault(path, {}).update(operations)
    for path, operations in schema["paths"].items():
        _name_parameters(path, operations)
    return schema


def _name_parameters(path: str, operations: dict[str, Any]) -> None:
    """OpenAPI wants each part of a path that is in braces described."""
    names = re.findall(r"{(\w+)}", path)
    parameters = [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
        for name in names
    ]
    for method, operation in operations.items():
        if names and "parameters" not in operation:
            operations[method] = operation | {"parameters": parameters}


async def _answer_error(request: Request, error: Exception) -> Response:
    if isinstance(error, ClientDisconnect):
        return Response(status_code=CLIENT_CLOSED_REQUEST)
    return _error_reply(request, error).response_at(request.url.path)


def _error_reply(request: Request, error: Exception) -> ErrorReply:
    match error:
        case TandemError():
            return error_reply(error)
        case HTTPException(status_code=404):
            text = f"There is no {request.method} {request.url.path} here."
            return error_reply(HttpError(404, text, code="not_found"))
        case HTTPException(status_code=405, headers=headers):
            text = f"{request.url.path} doesn't take {request.method}."
            refusal = HttpError(405, text, code="method_not_allowed", headers=dict(headers or {}))
            return error_reply(refusal)
        case HTTPException(status_code=status, detail=detail):
            return error_reply(HttpError(status, detail, code="http_error"))
        case _:
            # The server logs the traceback; it's no client's business.
            return INTERNAL_ERROR
