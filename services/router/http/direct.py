"""POSTs go straight to their endpoints: FastAPI's layers have nothing to do for them.

Parsing, validation and cleaning up are the endpoints' own; what the layers cost nevertheless is a
tenth of a short request's CPU time.
"""

from collections.abc import Awaitable, Callable, Mapping

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from protocol.errors import TandemError

Endpoint = Callable[[Request], Awaitable[Response]]
EXPECTED_ERRORS = (TandemError, HTTPException, ClientDisconnect)
"""Those that are an answer; any other is a bug, for the log too."""


class DirectRoutes:
    """An ASGI app: `endpoints` by path, and `app` for all else."""

    def __init__(
        self,
        app: ASGIApp,
        endpoints: Mapping[str, Endpoint],
        *,
        answer_error: Callable[[Request, Exception], Awaitable[Response]],
    ) -> None:
        self._app = app
        self._endpoints = endpoints
        self._answer_error = answer_error

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        endpoint = None
        if scope["type"] == "http" and scope["method"] == "POST":
            endpoint = self._endpoints.get(scope["path"])
        if endpoint is None:
            await self._app(scope, receive, send)
            return
        request = Request(scope, receive)
        try:
            response = await endpoint(request)
        except EXPECTED_ERRORS as error:
            response = await self._answer_error(request, error)
        except Exception as error:
            response = await self._answer_error(request, error)
            await response(scope, receive, send)
            raise  # for the server's log
        await response(scope, receive, send)
