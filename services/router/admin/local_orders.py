"""What one router does when any of them, itself included, gives an order."""

from collections.abc import Mapping

from redis.exceptions import RedisError

from protocol.ids import RequestId
from services.router.admin.orders import (
    AbortedRequests,
    AbortRequests,
    CountedRequests,
    CountRequests,
    Order,
    OrderAnswer,
    ReadSettings,
    SettingsRead,
)
from services.router.admin.shared_settings import SharedSettings
from services.router.http.errors import HttpError
from services.router.http.open_request import OpenRequest
from services.router.openai.api import CLIENT_CLOSED_REQUEST


class LocalOrders:
    """Acts on this router's requests and settings."""

    def __init__(
        self, open_requests: Mapping[RequestId, OpenRequest], settings: SharedSettings
    ) -> None:
        self._open_requests = open_requests
        self._settings = settings

    @property
    def num_open(self) -> int:
        return len(self._open_requests)

    async def take(self, order: Order) -> OrderAnswer:
        match order:
            case AbortRequests(request_id):
                return AbortedRequests(self.abort(request_id))
            case ReadSettings():
                return SettingsRead(await self._read_settings())
            case CountRequests():
                return CountedRequests(self.num_open)

    def abort(self, request_id: RequestId | None) -> list[RequestId]:
        """One of them, or with None all; returns those that weren't over."""
        if request_id is None:
            opened = list(self._open_requests.items())
        else:
            one = self._open_requests.get(request_id)
            opened = [] if one is None else [(request_id, one)]
        running = [(name, each) for name, each in opened if not each.generation.is_done]
        for _, each in running:
            each.fail(_aborted())
        return [name for name, _ in running]

    async def _read_settings(self) -> str | None:
        try:
            return await self._settings.read()
        except (RedisError, OSError) as error:
            return f"Redis failed: {error}."


def _aborted() -> HttpError:
    return HttpError(
        CLIENT_CLOSED_REQUEST,
        "The operator of this server aborted the request.",
        code="request_aborted",
    )
