"""The HTTP surface: which path goes where, and how errors leave."""

from dataclasses import dataclass

from fastapi import FastAPI, Request, Response
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from protocol.errors import TandemError
from services.router.admin.status_api import VERSION, StatusApi
from services.router.embeddings.api import EmbeddingsApi
from services.router.embeddings.refusal import refuse_generation
from services.router.http.auth import ApiKeyGuard
from services.router.http.direct import EXPECTED_ERRORS, DirectRoutes, Endpoint
from services.router.http.errors import INTERNAL_ERROR, ErrorReply, HttpError, error_reply
from services.router.http.headers import header
from services.router.messages.api import MessagesApi
from services.router.openai.answers import encode_json
from services.router.openai.api import CLIENT_CLOSED_REQUEST, OpenAIApi
from services.router.openapi.document import openapi_document
from services.router.responses.api import ResponsesApi
from services.router.responses.kept_api import KeptResponsesApi


class _CorsRules(CORSMiddleware):
    """Refuses in the API's own words, and leaves alone who sends no `Origin`: all but browsers."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and header(scope, b"origin") is None:
            await self.app(scope, receive, _varying(send))
        else:
            await super().__call__(scope, receive, send)

    def preflight_response(self, request_headers: Headers) -> Response:
        response = super().preflight_response(request_headers)
        if response.status_code < 400:
            return response
        headers = {name: value for name, value in response.headers.items() if "content" not in name}
        text = f"{bytes(response.body).decode()}."
        refusal = HttpError(400, text, code="cors_refused", headers=headers)
        return error_reply(refusal).response_at(path="/")


def _varying(send: Send) -> Send:
    """Tells caches that an `Origin` would have changed the answer."""

    async def send_varying(message: Message) -> None:
        if message["type"] == "http.response.start":
            message["headers"] = [*message["headers"], (b"vary", b"Origin")]
        await send(message)

    return send_varying


@dataclass(frozen=True, slots=True)
class Apis:
    """All that answers requests."""

    openai: OpenAIApi
    responses: ResponsesApi
    kept_responses: KeptResponsesApi
    messages: MessagesApi
    embeddings: EmbeddingsApi
    status: StatusApi


def make_app(
    apis: Apis,
    *,
    only_embeds: bool = False,
    api_keys: tuple[str, ...] = (),
    allowed_origins: tuple[str, ...] = (),
) -> FastAPI:
    """Without `api_keys` everybody is let in; without `allowed_origins` no other site's pages.
    If the model `only_embeds`, whoever wants text of it is told so."""
    app = FastAPI(
        openapi_url=None,
        docs_url=None,
        redoc_url=None,
        # A redirect would go to whatever host the client named.
        redirect_slashes=False,
        # Where OpenTelemetry happens to be installed, each request would ask whether it's wanted.
        telemetry={"tracing": False, "metrics": False, "logs": False},
    )
    generating = _generating_endpoints(apis)
    if only_embeds:
        generating = dict.fromkeys(generating, refuse_generation)
    endpoints = generating | _other_endpoints(apis)
    for path, endpoint in endpoints.items():
        app.router.routes.append(Route(path, endpoint, methods=["POST"]))
    _add_routes(app, apis, has_keys=bool(api_keys))
    for kind in (*EXPECTED_ERRORS, Exception):
        app.add_exception_handler(kind, _answer_error)
    stack: ASGIApp = app.build_middleware_stack()
    stack = DirectRoutes(stack, endpoints, answer_error=_answer_error)
    if api_keys:
        stack = ApiKeyGuard(stack, keys=api_keys)
    if allowed_origins:
        stack = _CorsRules(
            stack, allow_origins=allowed_origins, allow_methods=["*"], allow_headers=["*"]
        )
    app.middleware_stack = stack
    return app


def _generating_endpoints(apis: Apis) -> dict[str, Endpoint]:
    openai = apis.openai
    return {
        "/v1/chat/completions": openai.chat,
        "/v1/completions": openai.completions,
        "/v1/responses": apis.responses.create,
        "/v1/messages": apis.messages.create,
        "/v1/messages/count_tokens": apis.messages.count_tokens,
    }


def _other_endpoints(apis: Apis) -> dict[str, Endpoint]:
    embeddings, status = apis.embeddings, apis.status
    return {
        "/v1/embeddings": embeddings.embeddings,
        "/v1/score": embeddings.score,
        "/score": embeddings.score,
        "/v1/rerank": embeddings.rerank,
        "/v2/rerank": embeddings.rerank,
        "/rerank": embeddings.rerank,
        "/tokenize": status.tokenize,
        "/detokenize": status.detokenize,
    }


def _add_routes(app: FastAPI, apis: Apis, *, has_keys: bool) -> None:
    status = apis.status
    gets = {
        "/v1/models": status.models,
        "/v1/models/{name:path}": status.one_model,
        "/v1/responses/{response_id}": apis.kept_responses.retrieve,
        "/v1/responses/{response_id}/input_items": apis.kept_responses.input_items,
        "/health": status.health,
        "/version": status.version,
        "/load_config": status.load_config,
        "/metrics": status.metrics,
    }
    for path, endpoint in gets.items():
        app.add_api_route(path, endpoint, methods=["GET"], response_model=None)
    app.add_api_route(
        "/v1/responses/{response_id}",
        apis.kept_responses.delete,
        methods=["DELETE"],
        response_model=None,
    )
    app.add_api_route(
        "/v1/responses/{response_id}/cancel",
        apis.kept_responses.cancel,
        methods=["POST"],
        response_model=None,
    )
    app.add_api_route("/ping", status.health, methods=["GET", "POST"], response_model=None)
    description = encode_json(openapi_document(version=VERSION, has_keys=has_keys))

    async def openapi() -> Response:
        return Response(description, media_type="application/json")

    app.add_api_route("/openapi.json", openapi, methods=["GET"])


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
        case HTTPException(status_code=405):
            text = f"{request.url.path} doesn't take {request.method}."
            headers = {"Allow": ", ".join(_methods_at(request))}
            return error_reply(HttpError(405, text, code="method_not_allowed", headers=headers))
        case HTTPException(status_code=status, detail=detail):
            return error_reply(HttpError(status, detail, code="http_error"))
        case _:
            # The server logs the traceback; it's no client's business.
            return INTERNAL_ERROR


def _methods_at(request: Request) -> list[str]:
    """Of all routes there; each of them knows its own only."""
    methods: set[str] = set()
    for route in request.app.routes:
        if isinstance(route, Route) and route.path_regex.match(request.url.path):
            methods |= route.methods or set()
    return sorted(methods)
