"""Keeps answers of /v1/responses in Redis, so that a conversation can go on by an answer's id."""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# redis-py leaves many arguments and results untyped.
import asyncio
import logging
import math
from collections.abc import Awaitable
from typing import TypeVar, cast

import msgspec
from redis.asyncio import Redis
from redis.exceptions import RedisError

from services.router.http.errors import HttpError
from services.router.openai.bodies import Message
from services.runtime.redis_client import REPLY_DEADLINE_S
from services.runtime.redis_keys import RedisKeys

logger = logging.getLogger(__name__)

ReplyT = TypeVar("ReplyT")

# KEYS: the record, the ids and sizes of all records, their sum. ARGV: the record, its id, its
# milliseconds, the most bytes of all records, what the records' keys begin with. What has expired
# is counted until it is the oldest, so it never drives out what lives. Returns whether it's kept.
_PUT = """
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[3])
redis.call('RPUSH', KEYS[2], ARGV[2] .. ' ' .. #ARGV[1])
local total = redis.call('INCRBY', KEYS[3], #ARGV[1])
while total > tonumber(ARGV[4]) do
    local oldest = redis.call('LPOP', KEYS[2])
    if not oldest then
        redis.call('DEL', KEYS[3])
        break
    end
    local id, size = string.match(oldest, '(.*) (.*)')
    redis.call('DEL', ARGV[5] .. id)
    total = redis.call('DECRBY', KEYS[3], size)
end
return redis.call('EXISTS', KEYS[1])
"""


class StoredResponse(msgspec.Struct, frozen=True):
    """`answer` as the client got it; `conversation` is all up to and with it, each time anew, so
    that it depends on no older record."""

    answer: msgspec.Raw
    conversation: list[Message]


class ResponseStore:
    """Any router of the stack finds what another one kept.

    Keeps `max_bytes` at most, the newest, since workers announce themselves in the same Redis.
    """

    def __init__(
        self, redis: Redis, *, ttl_s: float, max_bytes: int, keys: RedisKeys | None = None
    ) -> None:
        """Keeps nothing with a `ttl_s` of 0."""
        self._redis = redis
        self._ttl_ms = math.ceil(ttl_s * 1000)
        self._max_bytes = max_bytes
        self._keys = keys or RedisKeys()
        self._decoder = msgspec.json.Decoder(StoredResponse)

    @property
    def keeps(self) -> bool:
        return self._ttl_ms > 0

    async def put(self, response_id: str, record: StoredResponse) -> bool:
        """False if it's too large. Raises HttpError if Redis is away."""
        keys = (self._keys.response(response_id), self._keys.responses, self._keys.response_bytes)
        value = msgspec.json.encode(record)
        limits = (self._ttl_ms, self._max_bytes, self._keys.response(""))
        kept = self._redis.eval(_PUT, len(keys), *keys, value, response_id, *limits)
        return bool(await self._reply(cast("Awaitable[int]", kept)))

    async def get(self, response_id: str) -> StoredResponse | None:
        """None if it's unknown or forgotten. Raises HttpError if Redis is away."""
        value = await self._reply(self._redis.get(self._keys.response(response_id)))
        return None if value is None else self._decoder.decode(cast("bytes", value))

    async def delete(self, response_id: str) -> bool:
        """False if there was none. Raises HttpError if Redis is away."""
        deleted = self._redis.delete(self._keys.response(response_id))
        return bool(await self._reply(deleted))

    async def _reply(self, asked: Awaitable[ReplyT]) -> ReplyT:
        try:
            async with asyncio.timeout(REPLY_DEADLINE_S):
                return await asked
        except (RedisError, OSError) as error:
            logger.warning("stored responses are out of reach: %s", error)
            raise HttpError(
                503,
                "Stored responses are out of reach now. Try again, or send the whole conversation "
                "without `previous_response_id`.",
                code="store_unavailable",
            ) from error
