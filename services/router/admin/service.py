"""A router's part in what operators do, put together."""

import asyncio
import contextlib
from collections.abc import Callable, Mapping, Sequence

from redis.asyncio import Redis
from redis.exceptions import RedisError
from starlette.routing import Route

from protocol.ids import RequestId, RouterId
from services.router.admin.admin_api import AdminApi
from services.router.admin.cache_resets import CacheResets
from services.router.admin.fleet import RouterFleet
from services.router.admin.live_settings import LiveSettings
from services.router.admin.local_orders import LocalOrders
from services.router.admin.orders import AbortRequests
from services.router.admin.shared_settings import SharedSettings
from services.router.http.errors import HttpError
from services.router.http.open_request import OpenRequest
from services.runtime.peers import Peer


class AdminService:
    """`routes` are to be added to the app, `run` keeps this router in step with the others."""

    def __init__(
        self,
        redis: Redis,
        settings: LiveSettings,
        *,
        router_id: RouterId,
        open_requests: Mapping[RequestId, OpenRequest],
        workers: Callable[[], Sequence[Peer]],
    ) -> None:
        """`router_id` must be this process's alone, in this life."""
        self.resets = CacheResets()
        self._settings = SharedSettings(redis, settings)
        self._own = own = LocalOrders(open_requests, self._settings)
        self.fleet = RouterFleet(redis, own.take, router_id=router_id)
        self._api = AdminApi(
            self.fleet,
            settings,
            self._settings,
            own=own,
            resets=self.resets,
            workers=workers,
        )

    @property
    def routes(self) -> list[Route]:
        return self._api.routes

    @property
    def unready_reason(self) -> str | None:
        """Why a request would be served by other settings than it should, None if it wouldn't."""
        if self._settings.were_read:
            return None
        return "This router hasn't read yet which settings hold."

    async def read_settings(self) -> None:
        """Takes what all routers have; without Redis that comes later."""
        with contextlib.suppress(RedisError, OSError):
            await self._settings.read()

    async def run(self) -> None:
        """Until cancelled; then `close`."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._settings.run())
            tasks.create_task(self.fleet.run())

    async def abort(self, request_id: RequestId) -> None:
        """Ends it, whichever router has it; without Redis that can't be done for the others'."""
        if not self._own.abort(request_id):
            with contextlib.suppress(HttpError):
                await self.fleet.order(AbortRequests(request_id))

    async def close(self) -> None:
        await self.fleet.withdraw()
