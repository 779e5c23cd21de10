"""The HTTP surface: which path goes where, and how errors leave."""

from fastapi import FastAPI, Request, Response
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.routing import Route

from protocol.errors import TandemError
from services.router.answers import encode_json
from services.router.auth import ApiKeyGuard
from services.router.http_errors import INTERNAL_ERROR, HttpError, error_reply
from services.router.openai_api import CLIENT_CLOSED_REQUEST, OpenAIApi
from services.router.openapi import openapi_document
from services.router.status_api import VERSION, StatusApi


class _CorsRules(CORSMiddleware):
    """Refuses in the API's own words."""

    def preflight_response(self, request_headers: Headers) -> Response:
        response = super().preflight_response(request_headers)
        if response.status_code < 400:
            return response
        headers = {name: value for name, value in response.headers.items() if "content" not in name}
        text = f"{bytes(response.body).decode()}."
        return error_reply(HttpError(400, text, code="cors_refused", headers=headers)).response


def make_app(
    openai: OpenAIApi,
    status: StatusApi,
    *,
    api_keys: tuple[str, ...] = (),
    allowed_origins: tuple[str, ...] = (),
) -> FastAPI:
    """Without `api_keys` everybody is let in; without `allowed_origins` no other site's pages."""
    app = FastAPI(
        openapi_url=None,
        docs_url=None,
        redoc_url=None,
        # A redirect would go to whatever host the client named.
        redirect_slashes=False,
    )
    _add_routes(app, openai, status, has_keys=bool(api_keys))
    for kind in (TandemError, HTTPException, ClientDisconnect, Exception):
        app.add_exception_handler(kind, _answer_error)
    if api_keys:
        app.add_middleware(ApiKeyGuard, keys=api_keys)
    if allowed_origins:
        app.add_middleware(
            _CorsRules, allow_origins=allowed_origins, allow_methods=["*"], allow_headers=["*"]
        )
    return app


def _add_routes(app: FastAPI, openai: OpenAIApi, status: StatusApi, *, has_keys: bool) -> None:
    posts = {
        "/v1/chat/completions": openai.chat,
        "/v1/completions": openai.completions,
        "/tokenize": status.tokenize,
        "/detokenize": status.detokenize,
    }
    for path, endpoint in posts.items():
        # Plain routes: FastAPI has nothing to parse here, and costs a request as much again.
        app.router.routes.append(Route(path, endpoint, methods=["POST"]))
    gets = {
        "/v1/models": status.models,
        "/v1/models/{name:path}": status.one_model,
        "/health": status.health,
        "/version": status.version,
        "/load": status.load,
        "/load_config": status.load_config,
        "/metrics": status.metrics,
    }
    for path, endpoint in gets.items():
        app.add_api_route(path, endpoint, methods=["GET"], response_model=None)
    # One route with all its methods, so that a 405 names them.
    app.add_api_route("/ping", status.health, methods=["GET", "POST"], response_model=None)
    description = encode_json(openapi_document(version=VERSION, has_keys=has_keys))

    async def openapi() -> Response:
        return Response(description, media_type="application/json")

    app.add_api_route("/openapi.json", openapi, methods=["GET"])


async def _answer_error(request: Request, error: Exception) -> Response:
    match error:
        case TandemError():
            return error_reply(error).response
        case HTTPException(status_code=404):
            text = f"There is no {request.method} {request.url.path} here."
            return error_reply(HttpError(404, text, code="not_found")).response
        case HTTPException(status_code=405, headers=headers):
            text = f"{request.url.path} doesn't take {request.method}."
            refusal = HttpError(405, text, code="method_not_allowed", headers=dict(headers or {}))
            return error_reply(refusal).response
        case HTTPException(status_code=status, detail=detail):
            return error_reply(HttpError(status, detail, code="http_error")).response
        case ClientDisconnect():
            return Response(status_code=CLIENT_CLOSED_REQUEST)
        case _:
            # The server logs the traceback; it's no client's business.
            return INTERNAL_ERROR.response
