"""Reads from Redis what the workers of a stack say about themselves."""

from typing import TypeVar

import msgspec
from redis.asyncio import Redis
from redis.exceptions import RedisError

from protocol.decoding import Decoder, decode
from protocol.errors import UnreadableError
from protocol.ids import WorkerId
from protocol.records import WorkerLoad, WorkerRecord
from services.runtime.redis_keys import RedisKeys

T = TypeVar("T")

_record_decoder = msgspec.json.Decoder(WorkerRecord)
_load_decoder = msgspec.json.Decoder(WorkerLoad)


class RegisteredWorkers:
    """A reader of workers' records and loads; an absent Redis is as good as an empty one."""

    def __init__(self, redis: Redis, *, keys: RedisKeys | None = None) -> None:
        self._redis = redis
        self._keys = keys or RedisKeys()

    async def record(self, worker_id: WorkerId) -> WorkerRecord | None:
        """The record of the worker's present incarnation."""
        return _decoded(await self._get(self._keys.worker(worker_id)), _record_decoder)

    async def load(self, worker_id: WorkerId) -> WorkerLoad | None:
        """What the worker last said about its load."""
        return _decoded(await self._get(self._keys.load(worker_id)), _load_decoder)

    async def _get(self, key: str) -> bytes | None:
        try:
            value = await self._redis.get(key)
        except (RedisError, OSError):
            return None
        return value if isinstance(value, bytes) else None


def _decoded(data: bytes | None, decoder: Decoder[T]) -> T | None:
    """None also for what another release of Tandem has written."""
    try:
        return None if data is None else decode(decoder, data)
    except UnreadableError:
        return None
