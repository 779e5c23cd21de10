"""Keeps the live settings of all routers in Redis, so that all have the same, whoever comes later.

- A change goes to Redis first; routers take from there what they hear, or see in passing, is new.
- Whoever knows a newer version than Redis, which was restarted empty, writes it there again.
- It expires some time after the last router: what is started anew goes by its own flags.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# redis-py leaves many arguments and results untyped.
import asyncio
import contextlib
import logging
from collections.abc import Mapping
from typing import Any, cast

import msgspec
from redis.asyncio import Redis
from redis.exceptions import RedisError

from protocol.decoding import decode
from protocol.errors import InvalidRequestError, UnreadableError
from services.router.admin.live_settings import LiveSettings
from services.runtime.redis_client import REPLY_DEADLINE_S
from services.runtime.redis_keys import RedisKeys, member_id

logger = logging.getLogger(__name__)

# Outlives a restart of all routers one by one, or an outage; not a new deployment.
TTL_S = 60.0
LOOK_S = 1.0

_decoder = msgspec.json.Decoder[Any](Any)

# KEYS: the settings. ARGV: their milliseconds, the version known here, how many settings those are,
# and names and values of these and of what is to change. Returns the hash.
_SYNCHRONIZE = """
local function set(first, last)
    for i = first, last, 2 do
        redis.call('HSET', KEYS[1], ARGV[i], ARGV[i + 1])
    end
end
local first_change = 4 + 2 * tonumber(ARGV[3])
if tonumber(redis.call('HGET', KEYS[1], 'version') or '0') < tonumber(ARGV[2]) then
    redis.call('DEL', KEYS[1])
    redis.call('HSET', KEYS[1], 'version', ARGV[2])
    set(4, first_change - 1)
end
if #ARGV >= first_change then
    redis.call('HINCRBY', KEYS[1], 'version', 1)
    set(first_change, #ARGV)
end
redis.call('PEXPIRE', KEYS[1], ARGV[1])
return redis.call('HGETALL', KEYS[1])
"""


class SharedSettings:
    """One router's view of them. Everything happens in the event loop."""

    def __init__(
        self, redis: Redis, settings: LiveSettings, *, keys: RedisKeys | None = None
    ) -> None:
        self._redis = redis
        self._settings = settings
        self._key = (keys or RedisKeys()).settings
        self._version = 0
        self._values: dict[bytes, bytes] = {}
        self._refusal: str | None = None
        self.were_read = False

    async def run(self) -> None:
        """Looks for changes that it didn't hear of, until cancelled."""
        while True:
            # The directory, which uses the same Redis, says it in the log.
            with contextlib.suppress(RedisError, OSError):
                await self.read()
            await asyncio.sleep(LOOK_S)

    async def read(self) -> str | None:
        """Takes what Redis has; why that can't be had here, if so. Raises RedisError or OSError."""
        return await self._synchronize({})

    async def change(self, changes: Mapping[str, Any]) -> None:
        """In Redis and here; the others are to be told. Raises RedisError or OSError."""
        await self._synchronize(changes)

    async def _synchronize(self, changes: Mapping[str, Any]) -> str | None:
        new = {name.encode(): msgspec.json.encode(value) for name, value in changes.items()}
        arguments: list[bytes | int] = [round(1000 * TTL_S), self._version, len(self._values)]
        for name, value in [*self._values.items(), *new.items()]:
            arguments += [name, value]
        async with asyncio.timeout(REPLY_DEADLINE_S):
            asked = self._redis.eval(_SYNCHRONIZE, 1, self._key, *cast("list[str]", arguments))
            reply = cast("list[bytes]", await cast("Any", asked))
        values = dict(zip(reply[::2], reply[1::2], strict=True))
        version = int(values.pop(b"version", 0))
        # Another task may have read later and be done sooner.
        if version >= self._version:
            self._take(version, values)
        return self._refusal

    def _take(self, version: int, values: dict[bytes, bytes]) -> None:
        is_new = version != self._version
        self._version, self._values, self.were_read = version, values, True
        try:
            self._settings.take({member_id(k): decode(_decoder, v) for k, v in values.items()})
            self._refusal = None
        except (InvalidRequestError, UnreadableError) as error:
            self._refusal = str(error)
            if is_new:
                logger.warning("settings of version %d can't be had here: %s", version, error)
