"""Keeps answers of /v1/responses in Redis, so that a conversation can go on by an answer's id.

A background response is kept from its start. Whoever runs it holds a lease, and with the lease the
right to write what becomes of it; who cancels it takes the lease away. A response that isn't over
and has no lease stays unfinished: its router is gone.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# redis-py leaves many arguments and results untyped.
import asyncio
import logging
import math
from collections.abc import Awaitable, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import msgspec
from redis.asyncio import Redis
from redis.exceptions import RedisError

from protocol.decoding import decode
from protocol.errors import UnreadableError
from services.router.http.errors import HttpError
from services.router.responses.bodies import InputItem
from services.runtime.redis_client import REPLY_DEADLINE_S
from services.runtime.redis_keys import RedisKeys, member_id

logger = logging.getLogger(__name__)

ReplyT = TypeVar("ReplyT")

# KEYS: the record, the ids and sizes of all records, their sum, the lease. ARGV: the record, its
# id, its milliseconds, the most bytes of all records, what the records' keys begin with, who must
# have the lease ('' for nobody), and who gets it (or '') for how many milliseconds.
# What has expired is counted until it is the oldest, so it never drives out what lives; nor does
# what has no room even alone. Returns whether it's kept, -1 if somebody else has the lease.
_PUT = """
if ARGV[6] ~= '' and redis.call('GET', KEYS[4]) ~= ARGV[6] then
    return -1
end
local before = redis.call('STRLEN', KEYS[1])
if before > 0 and redis.call('LREM', KEYS[2], -1, ARGV[2] .. ' ' .. before) > 0 then
    redis.call('DECRBY', KEYS[3], before)
end
redis.call('DEL', KEYS[1])
local total = 0
if #ARGV[1] <= tonumber(ARGV[4]) then
    redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[3])
    redis.call('RPUSH', KEYS[2], ARGV[2] .. ' ' .. #ARGV[1])
    total = redis.call('INCRBY', KEYS[3], #ARGV[1])
end
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
if ARGV[7] ~= '' then
    redis.call('SET', KEYS[4], ARGV[7], 'PX', ARGV[8])
elseif ARGV[6] ~= '' then
    redis.call('DEL', KEYS[4])
end
return redis.call('EXISTS', KEYS[1])
"""
# KEYS: the lease, the record. ARGV: who should have the lease, for how many milliseconds from now,
# and those of the record, which lives no shorter than its run. Returns whether.
_RENEW = """
if redis.call('GET', KEYS[1]) ~= ARGV[1] then
    return 0
end
redis.call('PEXPIRE', KEYS[2], ARGV[3])
return redis.call('PEXPIRE', KEYS[1], ARGV[2])
"""

_RUNNER_MS = 15_000


class StoredResponse(msgspec.Struct, frozen=True):
    """`answer` as the client got it; `input` is all before it, each time anew, so that it depends
    on no older record."""

    answer: msgspec.Raw
    input: list[InputItem]

    def with_answer(self, **fields: object) -> "StoredResponse":
        """With other values of some of the answer's fields."""
        answer = msgspec.json.decode(self.answer) | fields
        return StoredResponse(msgspec.Raw(msgspec.json.encode(answer)), self.input)


@dataclass(frozen=True, slots=True)
class Kept:
    """A record, and who runs it, if anybody does."""

    record: StoredResponse
    runner: str | None


class ResponseStore:
    """Any router of the stack finds what another one kept. All raise HttpError if Redis is away.

    Keeps `max_bytes` at most, the newest, since workers announce themselves in the same Redis.
    """

    def __init__(
        self, redis: Redis, *, ttl_s: float, max_bytes: int, keys: RedisKeys | None = None
    ) -> None:
        """Keeps nothing with a `ttl_s` of 0."""
        self._redis = redis
        self._ttl_ms = math.ceil(ttl_s * 1000)
        self._running_ttl_ms = max(self._ttl_ms, _RUNNER_MS)
        self._max_bytes = max_bytes
        self._keys = keys or RedisKeys()
        self._decoder = msgspec.json.Decoder(StoredResponse)

    @property
    def keeps(self) -> bool:
        return self._ttl_ms > 0

    async def put(
        self,
        response_id: str,
        record: StoredResponse,
        *,
        runner: str | None = None,
        next_runner: str | None = None,
    ) -> bool:
        """False if it's too large, or if `runner`, where there's one, doesn't run it any more.

        `next_runner` does from now on.
        """
        keys = (
            *(self._keys.response(response_id), self._keys.responses, self._keys.response_bytes),
            self._keys.response_runner(response_id),
        )
        value = msgspec.json.encode(record)
        ttl_ms = self._ttl_ms if next_runner is None else self._running_ttl_ms
        limits = (ttl_ms, self._max_bytes, self._keys.response(""))
        runners = (runner or "", next_runner or "", _RUNNER_MS)
        kept = self._redis.eval(_PUT, len(keys), *keys, value, response_id, *limits, *runners)
        return await self._reply(cast("Awaitable[int]", kept)) > 0

    async def renew(self, response_id: str, runner: str) -> bool:
        """False if `runner` doesn't run it any more."""
        keys = self._keys.response_runner(response_id), self._keys.response(response_id)
        arguments = cast("Any", (runner, _RUNNER_MS, self._running_ttl_ms))
        renewed = self._redis.eval(_RENEW, len(keys), *keys, *arguments)
        return bool(await self._reply(cast("Awaitable[int]", renewed)))

    async def get(self, response_id: str) -> Kept | None:
        """None if it's unknown, forgotten or unreadable."""
        keys = self._keys.response(response_id), self._keys.response_runner(response_id)
        value, runner = cast("list[bytes | None]", await self._reply(self._redis.mget(keys)))
        if value is None:
            return None
        try:
            record = decode(self._decoder, value)
        except UnreadableError as error:
            logger.warning("the kept response %s is unreadable: %s", response_id, error)
            return None
        return Kept(record, None if runner is None else member_id(runner))

    async def delete(self, response_id: str) -> bool:
        """False if there was none."""
        keys = self._keys.response(response_id), self._keys.response_runner(response_id)
        return bool(await self._reply(self._redis.delete(*keys)))

    async def abandon(self, response_ids: Iterable[str]) -> None:
        """Nobody runs these any more."""
        keys = [self._keys.response_runner(response_id) for response_id in response_ids]
        if keys:
            await self._reply(self._redis.delete(*keys))

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
