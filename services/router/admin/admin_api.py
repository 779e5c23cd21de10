"""What operators may do to a running server: change settings, drop caches, abort requests.

Whichever router is asked, all of them do it; only caches are the workers' own.
"""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec
from redis.exceptions import RedisError
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from protocol.errors import InvalidRequestError, ServiceUnavailableError
from services.router.admin.cache_resets import CacheResets
from services.router.admin.fleet import RouterFleet, redis_away
from services.router.admin.live_settings import LiveSettings, LiveSettingsBody, refusal_of
from services.router.admin.local_orders import LocalOrders
from services.router.admin.orders import (
    AbortedRequests,
    AbortRequests,
    CountedRequests,
    CountRequests,
    OrderAnswer,
    ReadSettings,
    SettingsRead,
)
from services.router.admin.shared_settings import SharedSettings
from services.router.http.body import BodyReader
from services.router.http.errors import HttpError
from services.router.openai.answers import encode_json
from services.runtime.peers import Peer

_MAX_BODY_BYTES = 65_536

Answers = Mapping[str, OrderAnswer | None]


class AbortBody(msgspec.Struct, kw_only=True):
    """One of the two."""

    request_id: str | None = None
    abort_all: bool = False


class AdminApi:
    """Its errors are TandemErrors, which the app puts into words."""

    def __init__(
        self,
        fleet: RouterFleet,
        settings: LiveSettings,
        shared: SharedSettings,
        *,
        own: LocalOrders,
        resets: CacheResets,
        workers: Callable[[], Sequence[Peer]],
    ) -> None:
        self._fleet = fleet
        self._settings = settings
        self._shared = shared
        self._own = own
        self._resets = resets
        self._workers = workers
        self._setting_bodies = BodyReader(LiveSettingsBody, max_bytes=_MAX_BODY_BYTES)
        self._abort_bodies = BodyReader(AbortBody, max_bytes=_MAX_BODY_BYTES)

    @property
    def routes(self) -> list[Route]:
        return [
            Route("/load", self.load, methods=["GET"]),
            Route("/load_config", self.load_config, methods=["POST"]),
            Route("/reset_prefix_cache", self.reset_prefix_cache, methods=["POST"]),
            Route("/abort", self.abort, methods=["POST"]),
        ]

    async def load(self, request: Request) -> Response:  # noqa: ARG002
        """Without Redis it's still worth something to know the load of this router."""
        answers: Answers = {}
        if self._fleet.is_reachable:
            with contextlib.suppress(HttpError):  # the fleet has logged why
                answers = await self._fleet.order(CountRequests())
        counts = {
            router_id: answer.num_open if isinstance(answer, CountedRequests) else None
            for router_id, answer in answers.items()
        }
        is_whole = None not in counts.values() and bool(counts)
        counts[self._fleet.router_id] = self._own.num_open
        load = sum(count or 0 for count in counts.values())
        return _json({"server_load": load, "routers": counts, "is_whole": is_whole})

    async def load_config(self, request: Request) -> Response:
        try:
            body = await self._setting_bodies.read(request)
        except InvalidRequestError as error:
            raise refusal_of(error) from error
        await self._fleet.until_reachable()
        try:
            await self._shared.change(msgspec.to_builtins(body))
        except (RedisError, OSError) as error:
            outcome = "the change may have been kept or not, GET /load_config will say"
            raise redis_away(outcome) from error
        answers = await self._fleet.order(ReadSettings())
        _refuse_silence(answers, "The change is kept, and they take it when they are back.")
        for router_id, answer in answers.items():
            if isinstance(answer, SettingsRead) and answer.refusal is not None:
                text = f"{router_id} can't take it: {answer.refusal} The others have."
                raise HttpError(503, text, code="settings_refused")
        return _json({"settings": self._settings.public(), "num_routers": len(answers)})

    async def reset_prefix_cache(self, request: Request) -> Response:  # noqa: ARG002
        dropped = await self._resets.reset(self._workers())
        silent = [worker_id for worker_id, count in dropped.items() if count is None]
        if silent:
            raise ServiceUnavailableError(
                f"{', '.join(silent)} didn't answer; of the others all caches are empty."
            )
        return _json(
            {
                "success": True,
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
        if body.request_id is not None and (own := self._own.abort(body.request_id)):
            # No other router has it, too.
            return _json({"num_aborted": 1, "request_ids": own, "num_routers": 1})
        answers = await self._fleet.order(AbortRequests(body.request_id))
        taken = [answer for answer in answers.values() if isinstance(answer, AbortedRequests)]
        aborted = [request_id for answer in taken for request_id in answer.request_ids]
        if body.request_id is None or not aborted:
            done = f"The others have aborted {len(aborted)} requests."
            _refuse_silence(answers, done if body.abort_all else "No other has this request.")
        if body.request_id is not None and not aborted:
            text = f"There is no request `{body.request_id:.80}` under way."
            raise HttpError(404, text, code="request_not_found")
        return _json(
            {"num_aborted": len(aborted), "request_ids": aborted, "num_routers": len(taken)}
        )


def _refuse_silence(answers: Answers, outcome: str) -> None:
    silent = [router_id for router_id, answer in answers.items() if answer is None]
    if silent:
        text = f"{', '.join(silent)} didn't answer. {outcome}"
        raise HttpError(503, text, code="router_silent")


def _json(content: dict[str, Any]) -> Response:
    return Response(encode_json(content), media_type="application/json")
