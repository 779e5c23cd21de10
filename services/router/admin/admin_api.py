"""What operators may do to a running server: change settings, drop caches, abort requests."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from protocol.errors import InvalidRequestError, ServiceUnavailableError
from services.router.admin.cache_resets import CacheResets
from services.router.admin.live_settings import LiveSettings, LiveSettingsBody, refusal_of
from services.router.http.body import BodyReader
from services.router.http.errors import HttpError
from services.router.http.open_request import OpenRequest
from services.router.openai.answers import encode_json
from services.router.openai.api import CLIENT_CLOSED_REQUEST
from services.runtime.peers import Peer

_MAX_BODY_BYTES = 65_536


class AbortBody(msgspec.Struct, kw_only=True):
    """One of the two."""

    request_id: str | None = None
    abort_all: bool = False


class AdminApi:
    """Settings and requests are this router's own, caches those of all workers."""

    def __init__(
        self,
        settings: LiveSettings,
        resets: CacheResets,
        *,
        workers: Callable[[], Sequence[Peer]],
        open_requests: Mapping[str, OpenRequest],
    ) -> None:
        self._settings = settings
        self._resets = resets
        self._workers = workers
        self._open_requests = open_requests
        self._setting_bodies = BodyReader(LiveSettingsBody, max_bytes=_MAX_BODY_BYTES)
        self._abort_bodies = BodyReader(AbortBody, max_bytes=_MAX_BODY_BYTES)

    @property
    def routes(self) -> list[Route]:
        return [
            Route("/load_config", self.load_config, methods=["POST"]),
            Route("/reset_prefix_cache", self.reset_prefix_cache, methods=["POST"]),
            Route("/abort", self.abort, methods=["POST"]),
        ]

    async def load_config(self, request: Request) -> Response:
        try:
            body = await self._setting_bodies.read(request)
        except InvalidRequestError as error:
            raise refusal_of(error) from error
        self._settings.change(body)
        return _json({"settings": self._settings.public()})

    async def reset_prefix_cache(self, request: Request) -> Response:  # noqa: ARG002
        dropped = await self._resets.reset(self._workers())
        silent = [worker_id for worker_id, count in dropped.items() if count is None]
        if silent:
            raise ServiceUnavailableError(
                f"{', '.join(silent)} didn't answer; of the others all caches are empty."
            )
        return _json(
            {
                "num_dropped_blocks": sum(count or 0 for count in dropped.values()),
                "workers": dropped,
            }
        )

    async def abort(self, request: Request) -> Response:
        body = await self._abort_bodies.read(request)
        if (body.request_id is not None) == body.abort_all:
            raise InvalidRequestError(
                "Give either `request_id` or `abort_all`.", field="request_id"
            )
        running = {
            request_id: opened
            for request_id, opened in self._open_requests.items()
            if not opened.generation.is_done and body.request_id in (None, request_id)
        }
        if body.request_id is not None and not running:
            text = f"There is no request `{body.request_id}` under way."
            raise HttpError(404, text, code="request_not_found")
        for opened in running.values():
            opened.fail(_aborted())
        return _json({"num_aborted": len(running), "request_ids": list(running)})


def _aborted() -> HttpError:
    return HttpError(
        CLIENT_CLOSED_REQUEST,
        "The operator of this server aborted the request.",
        code="request_aborted",
    )


def _json(content: dict[str, Any]) -> Response:
    return Response(encode_json(content), media_type="application/json")
