"""The API's endpoints without HTTP: the same functions, called with a body in memory."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Message

from protocol.errors import TandemError
from services.router.batch.answer import Answer
from services.router.http.errors import INTERNAL_ERROR, error_reply

logger = logging.getLogger(__name__)

Endpoint = Callable[[Request], Awaitable[Response]]


class InProcessApi:
    """`client` is who asks, to the admission queue, which shares places among its clients."""

    def __init__(self, endpoints: Mapping[str, Endpoint], *, client: str) -> None:
        self._endpoints = endpoints
        self._headers = [
            (b"content-type", b"application/json"),
            (b"authorization", client.encode()),
        ]

    @property
    def paths(self) -> tuple[str, ...]:
        return tuple(self._endpoints)

    async def post(self, path: str, body: bytes) -> Answer:
        """Answers as HTTP would, errors included. To cancel it is to close the connection."""
        scope = {
            "type": "http",
            "method": "POST",
            "path": path,
            "query_string": b"",
            "headers": self._headers,
        }
        request = Request(scope, _receiver(body))
        try:
            response = await self._endpoints[path](request)
        except TandemError as error:
            response = error_reply(error).response_at(path)
        except Exception:
            # What the HTTP server does with a bug of ours: this request fails, the others go on.
            logger.exception("a request to %s failed", path)
            response = INTERNAL_ERROR.response_at(path)
        return Answer(response.status_code, bytes(response.body))


def _receiver(body: bytes) -> Callable[[], Awaitable[Message]]:
    is_sent = False

    async def receive() -> Message:
        nonlocal is_sent
        if is_sent:
            # A client that waits for its answer says nothing; its task is cancelled in time.
            await asyncio.get_running_loop().create_future()
        is_sent = True
        return {"type": "http.request", "body": body, "more_body": False}

    return receive
