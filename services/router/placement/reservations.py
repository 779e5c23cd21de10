"""Tells the other routers what this one has placed, over Redis pub/sub, and hears it from them.

Sums by worker are sent `interval_s` after a change and again every `repeat_s` while there are
any; a lost message is repaired by the next, a dead router's sums expire. Nobody waits for it:
without Redis each router counts its own placements only.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# redis-py leaves many arguments and results untyped.
import asyncio
import logging
from typing import cast

import msgspec
from redis.asyncio import Redis
from redis.exceptions import RedisError

from protocol.decoding import decode
from protocol.errors import UnreadableError
from protocol.ids import RouterId, WorkerId
from services.router.placement.ledger import PlacedWork, PlacementLedger
from services.runtime.redis_client import REPLY_DEADLINE_S
from services.runtime.redis_keys import RedisKeys

logger = logging.getLogger(__name__)


class PlacedSums(msgspec.Struct, frozen=True):
    """One router's unreported placements."""

    router_id: RouterId
    works: dict[WorkerId, PlacedWork]


class SharedReservations:
    """Keeps several routers' ledgers in step."""

    def __init__(
        self,
        redis: Redis,
        ledger: PlacementLedger,
        *,
        router_id: RouterId,
        keys: RedisKeys | None = None,
        interval_s: float = 0.02,
        repeat_s: float = 0.5,
        retry_s: float = 1.0,
    ) -> None:
        self._redis = redis
        self._ledger = ledger
        self._router_id = router_id
        self._channel = (keys or RedisKeys()).placed
        self._interval_s = interval_s
        self._repeat_s = repeat_s
        self._retry_s = retry_s
        self._decoder = msgspec.msgpack.Decoder(PlacedSums)

    async def run(self) -> None:
        """Sends and listens until cancelled; an outage of Redis isn't an error here."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._send_forever())
            tasks.create_task(self._listen_forever())

    async def _send_forever(self) -> None:
        sent: dict[WorkerId, PlacedWork] = {}
        sent_s = 0.0
        now = asyncio.get_running_loop().time
        while True:
            works = self._ledger.own
            if works != sent or (works and now() >= sent_s + self._repeat_s):
                sent, sent_s = works, now()
                try:
                    async with asyncio.timeout(REPLY_DEADLINE_S):
                        await self._redis.publish(
                            self._channel,
                            msgspec.msgpack.encode(PlacedSums(self._router_id, works)),
                        )
                except (RedisError, OSError):
                    # The directory, which uses the same Redis, says it in the log.
                    await asyncio.sleep(self._retry_s)
            await asyncio.sleep(self._interval_s)

    async def _listen_forever(self) -> None:
        while True:
            try:
                await self._listen()
            except (RedisError, OSError):
                await asyncio.sleep(self._retry_s)

    async def _listen(self) -> None:
        async with self._redis.pubsub(ignore_subscribe_messages=True) as pubsub:
            async with asyncio.timeout(REPLY_DEADLINE_S):
                await pubsub.subscribe(self._channel)
            while True:
                message = await pubsub.get_message(timeout=self._repeat_s)
                if message is not None:
                    self._heard(cast("bytes", message["data"]))

    def _heard(self, payload: bytes) -> None:
        try:
            sums = decode(self._decoder, payload)
        except UnreadableError as error:
            logger.warning("unreadable placements of another router: %s", error)
            return
        if sums.router_id != self._router_id:
            self._ledger.others_placed(sums.router_id, sums.works)
