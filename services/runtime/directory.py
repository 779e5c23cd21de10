"""Which workers are registered in Redis, as a list that is right again after every outage."""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# redis-py leaves many arguments and results untyped.
import asyncio
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias, cast

import msgspec
from redis.asyncio import Redis
from redis.exceptions import RedisError

from protocol.decoding import decode
from protocol.errors import UnreadableError
from protocol.ids import WorkerId
from protocol.messages import PROTOCOL_VERSION
from protocol.records import WorkerLoad, WorkerRecord
from services.runtime.redis_client import REPLY_DEADLINE_S
from services.runtime.redis_keys import RedisKeys, member_id

logger = logging.getLogger(__name__)

Records: TypeAlias = Mapping[WorkerId, WorkerRecord]


@dataclass(frozen=True, slots=True)
class DirectoryTimings:
    scan_s: float = 1.0
    first_retry_s: float = 0.1
    longest_retry_s: float = 2.0


class WorkerDirectory:
    """Calls `on_records` with all registered workers after each look into Redis.

    A look follows every announcement (a worker that comes or leaves is seen in milliseconds), a
    reconnection, and `scan_s` without either. While Redis is away there are no calls: what to
    think of the workers known before is the caller's decision, who has connections to them.
    """

    def __init__(
        self,
        redis: Redis,
        on_records: Callable[[Records], None],
        *,
        keys: RedisKeys | None = None,
        timings: DirectoryTimings | None = None,
    ) -> None:
        self._redis = redis
        self._on_records = on_records
        self._keys = keys or RedisKeys()
        self._timings = timings or DirectoryTimings()
        self._refused: set[bytes] = set()
        self.connected = False

    async def run(self) -> None:
        """Watches until cancelled; an outage of Redis isn't an error here."""
        pause_s = self._timings.first_retry_s
        while True:
            try:
                await self._watch()
            except (RedisError, OSError) as error:
                if self.connected or pause_s == self._timings.first_retry_s:
                    logger.warning("Redis is away (%s); serving with the workers known", error)
                if self.connected:
                    pause_s = self._timings.first_retry_s
                self.connected = False
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, self._timings.longest_retry_s)

    async def _watch(self) -> None:
        async with self._redis.pubsub(ignore_subscribe_messages=True) as pubsub:
            # Subscribed before the first look, so that nobody comes unseen in between.
            async with asyncio.timeout(REPLY_DEADLINE_S):
                await pubsub.subscribe(self._keys.announce)
            while True:
                async with asyncio.timeout(REPLY_DEADLINE_S):
                    records = await read_records(self._redis, self._keys, refused=self._refused)
                self.connected = True
                self._on_records(records)
                await pubsub.get_message(timeout=self._timings.scan_s)


async def read_records(
    redis: Redis, keys: RedisKeys, *, refused: set[bytes] | None = None
) -> dict[WorkerId, WorkerRecord]:
    """All registered workers that speak our protocol version. Raises RedisError.

    `refused` remembers what was already warned about.
    """
    refused = set() if refused is None else refused
    worker_ids = await _worker_ids(redis, keys)
    if not worker_ids:
        return {}
    keys_of_records = [keys.worker(worker_id) for worker_id in worker_ids]
    values = cast("list[bytes | None]", await redis.mget(keys_of_records))
    expired = [
        worker_id for worker_id, value in zip(worker_ids, values, strict=True) if value is None
    ]
    if expired:
        # A worker that lives after all adds itself again with its next heartbeat.
        await redis.srem(keys.workers, *expired)
    records: dict[WorkerId, WorkerRecord] = {}
    for value in values:
        record = None if value is None else _decode(value, refused)
        if record is not None:
            records[record.ref.worker_id] = record
    return records


async def read_loads(
    redis: Redis, keys: RedisKeys, worker_ids: list[WorkerId]
) -> dict[WorkerId, WorkerLoad]:
    """The loads that these workers last published; those without a readable one are left out."""
    if not worker_ids:
        return {}
    asked = redis.mget([keys.load(worker_id) for worker_id in worker_ids])
    values = cast("list[bytes | None]", await asked)
    loads: dict[WorkerId, WorkerLoad] = {}
    for worker_id, value in zip(worker_ids, values, strict=True):
        if value is None:
            continue
        try:
            loads[worker_id] = decode(_load_decoder, value)
        except UnreadableError as error:
            logger.error("unreadable load of %s: %s", worker_id, error)
    return loads


async def _worker_ids(redis: Redis, keys: RedisKeys) -> list[WorkerId]:
    members = cast("set[bytes]", await cast("Any", redis.smembers(keys.workers)))
    return sorted(map(member_id, members))


class _Versioned(msgspec.Struct):
    """What every version's record has."""

    protocol_version: int


_version_decoder = msgspec.json.Decoder(_Versioned)
_record_decoder = msgspec.json.Decoder(WorkerRecord)
_load_decoder = msgspec.json.Decoder(WorkerLoad)


def _decode(value: bytes, refused: set[bytes]) -> WorkerRecord | None:
    try:
        version = decode(_version_decoder, value).protocol_version
        if version == PROTOCOL_VERSION:
            return decode(_record_decoder, value)
        problem = f"it speaks protocol version {version}, this process {PROTOCOL_VERSION}"
    except UnreadableError as error:
        problem = str(error)
    if value not in refused:
        refused.add(value)
        logger.error("ignored a worker's record: %s: %s", problem, value[:300])
    return None
