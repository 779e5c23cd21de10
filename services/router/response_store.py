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

from services.router.http_errors import HttpError
from services.router.openai_bodies import Message
from services.runtime.redis_client import REPLY_DEADLINE_S
from services.runtime.redis_keys import RedisKeys

logger = logging.getLogger(__name__)

ReplyT = TypeVar("ReplyT")


class StoredResponse(msgspec.Struct, frozen=True):
    """`answer` as the client got it; `conversation` is all up to and with it, each time anew, so
    that it depends on no older record."""

    answer: msgspec.Raw
    conversation: list[Message]


class ResponseStore:
    """Any router of the stack finds what another one kept. Keeps nothing with a `ttl_s` of 0."""

    def __init__(self, redis: Redis, *, ttl_s: float, keys: RedisKeys | None = None) -> None:
        self._redis = redis
        self._ttl_ms = math.ceil(ttl_s * 1000)
        self._keys = keys or RedisKeys()
        self._decoder = msgspec.json.Decoder(StoredResponse)

    @property
    def keeps(self) -> bool:
        return self._ttl_ms > 0

    async def put(self, response_id: str, record: StoredResponse) -> None:
        """Raises HttpError if Redis is away."""
        key, value = self._keys.response(response_id), msgspec.json.encode(record)
        await self._reply(self._redis.set(key, value, px=self._ttl_ms))

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
