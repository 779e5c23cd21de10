"""Reads from Redis what the workers of a stack say about themselves."""

from typing import cast

import msgspec
import redis.asyncio
from redis.exceptions import RedisError

from protocol.ids import WorkerId
from protocol.records import WorkerLoad, WorkerRecord

_TIMEOUT_S = 2.0


class WorkerDirectory:
    """A reader of `worker:{id}` and `load:{id}`; an absent Redis is as good as an empty one."""

    def __init__(self, redis_url: str) -> None:
        self._redis = redis.asyncio.from_url(
            redis_url, socket_timeout=_TIMEOUT_S, socket_connect_timeout=_TIMEOUT_S
        )

    async def worker(self, worker_id: WorkerId) -> WorkerRecord | None:
        """The record of the worker's present incarnation."""
        data = await self._get(f"worker:{worker_id}")
        return None if data is None else msgspec.msgpack.decode(data, type=WorkerRecord)

    async def load(self, worker_id: WorkerId) -> WorkerLoad | None:
        """What the worker last said about its load."""
        data = await self._get(f"load:{worker_id}")
        return None if data is None else msgspec.msgpack.decode(data, type=WorkerLoad)

    async def aclose(self) -> None:
        await self._redis.aclose()

    async def _get(self, key: str) -> bytes | None:
        try:
            return cast("bytes | None", await self._redis.get(key))
        except (RedisError, OSError):
            return None
