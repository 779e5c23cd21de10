"""What files and batches have in common: records in Redis, listed by the time they were made."""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# redis-py leaves many arguments and results untyped.
import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from typing import Any, Generic, TypeVar, cast

import msgspec
from redis.asyncio import Redis
from redis.exceptions import RedisError

from protocol.decoding import decode
from protocol.errors import InvalidRequestError, UnreadableError
from services.router.http.errors import StorageUnavailableError
from services.router.http.pages import PageQuery
from services.runtime.redis_client import REPLY_DEADLINE_S
from services.runtime.redis_keys import member_id

logger = logging.getLogger(__name__)

Record = TypeVar("Record", bound=msgspec.Struct)

_SLICE = 256


@asynccontextmanager
async def reaching_storage(deadline_s: float = REPLY_DEADLINE_S) -> AsyncGenerator[None]:
    """Around what asks Redis for a client: an outage, or a record that this release can't read,
    becomes StorageUnavailableError."""
    try:
        async with asyncio.timeout(deadline_s):
            yield
    except (RedisError, OSError, UnreadableError) as error:
        raise StorageUnavailableError(f"The store of files and batches failed: {error}") from error


class RecordIndex(Generic[Record]):
    """A sorted set of ids, each with a record that may have expired."""

    def __init__(
        self, redis: Redis, kind: type[Record], *, index: str, record_key: Callable[[str], str]
    ) -> None:
        self._redis = redis
        self._decoder = msgspec.json.Decoder(kind)
        self._index = index
        self._record_key = record_key

    async def add(self, record_id: str) -> None:
        await self._redis.zadd(self._index, {record_id: int(1e6 * time.time())})

    async def remove(self, record_id: str) -> None:
        await self._redis.zrem(self._index, record_id)

    async def get(self, record_id: str) -> Record | None:
        """Raises UnreadableError if another release's record can't be read."""
        async with asyncio.timeout(REPLY_DEADLINE_S):
            value = await self._redis.get(self._record_key(record_id))
        return None if value is None else decode(self._decoder, cast("bytes", value))

    async def page(
        self, query: PageQuery, *, wanted: Callable[[Record], bool] = lambda _: True
    ) -> tuple[list[Record], bool]:
        """The readable records, and whether more follow.

        Raises InvalidRequestError for a bad `after`.
        """
        found: list[Record] = []
        expired: list[bytes] = []
        start = await self._start(query)
        while len(found) <= query.limit:
            reply = await self._redis.zrange(
                self._index, start, start + _SLICE - 1, desc=not query.ascending
            )
            ids = cast("list[bytes]", reply)
            if not ids:
                break
            start += len(ids)
            values = await self._redis.mget([self._record_key(member_id(one)) for one in ids])
            for record_id, value in zip(ids, values, strict=True):
                if value is None:
                    expired.append(record_id)
                elif (record := self._readable(record_id, cast("bytes", value))) and wanted(record):
                    found.append(record)
        if expired:
            # Only now: places in the set were counted on.
            await self._redis.zrem(self._index, *expired)
        return found[: query.limit], len(found) > query.limit

    def _readable(self, record_id: bytes, value: bytes) -> Record | None:
        try:
            return decode(self._decoder, value)
        except UnreadableError as error:
            logger.warning("%s is left out of the list: %s", member_id(record_id), error)
            return None

    async def _start(self, query: PageQuery) -> int:
        if query.after is None:
            return 0
        rank_of: Any = self._redis.zrank if query.ascending else self._redis.zrevrank
        rank = cast("int | None", await rank_of(self._index, query.after))
        if rank is None:
            raise InvalidRequestError(f"There is no `{query.after}` in the list.", field="after")
        return rank + 1
