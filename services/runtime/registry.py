"""A worker's presence in Redis: who it is, how loaded it is, which blocks it holds.

1. `run` writes everything anew: record, load, the whole block set, a marker in the event stream.
2. Every `refresh_s` the heartbeat renews what expires; KV events follow within `gather_s`.
3. Redis fails: the worker goes on, changes are kept in memory only, `run` tries again with
   growing pauses and starts over at 1. The skipped sequence number tells routers to resynchronise.
4. `withdraw` removes everything on a clean exit; after a crash it expires.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# redis-py leaves many arguments and results untyped.
import asyncio
import logging
import time
from dataclasses import dataclass

import msgspec
from redis.asyncio import Redis
from redis.asyncio.client import Pipeline
from redis.exceptions import RedisError

from protocol.records import (
    BlocksCleared,
    BlocksRemoved,
    BlocksStored,
    KVEvent,
    KVEventBatch,
    WorkerLoad,
    WorkerRecord,
)
from services.runtime.block_inventory import BlockInventory
from services.runtime.redis_client import REPLY_DEADLINE_S
from services.runtime.redis_keys import BATCH_FIELD, RedisKeys, entry_id

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class RegistryTimings:
    """How soon others see a change, and how long the dead are remembered."""

    refresh_s: float = 0.5
    record_ttl_s: float = 3.0
    blocks_ttl_s: float = 30.0
    gather_s: float = 0.01
    first_retry_s: float = 0.1
    longest_retry_s: float = 2.0


# A router that is further behind than this resynchronises from the block set.
STREAM_LENGTH = 4096
UPLOAD_CHUNK = 8192
UPLOAD_DEADLINE_S = 30.0


class WorkerRegistration:
    """Publishes one worker incarnation. All but `run` and `withdraw` returns at once."""

    def __init__(
        self,
        redis: Redis,
        record: WorkerRecord,
        *,
        keys: RedisKeys | None = None,
        timings: RegistryTimings | None = None,
    ) -> None:
        self._redis = redis
        self._record = record
        self._record_json = msgspec.json.encode(record)
        self._keys = keys or RedisKeys()
        self._timings = timings or RegistryTimings()
        self._load = WorkerLoad()
        self._inventory = BlockInventory()
        self._next_sequence = 0
        self._connected = False
        self._changed = asyncio.Event()

    @property
    def connected(self) -> bool:
        """Whether Redis has what this worker has, but for the last moment's changes."""
        return self._connected

    def update_load(self, load: WorkerLoad) -> None:
        """Published with the next heartbeat."""
        self._load = load

    def publish_kv(self, events: list[KVEvent]) -> None:
        """Takes the block pool's events, in their order. Call it in the event loop's thread."""
        if events:
            self._inventory.apply(events)
            self._changed.set()

    async def run(self) -> None:
        """Keeps Redis up to date until cancelled; an outage of Redis isn't an error here."""
        pause_s = self._timings.first_retry_s
        while True:
            try:
                async with asyncio.timeout(UPLOAD_DEADLINE_S):
                    await self._publish_all()
                if not self._connected:
                    logger.info("registered as %s", self._record.ref.worker_id)
                self._connected = True
                pause_s = self._timings.first_retry_s
                await self._keep_current()
            except (RedisError, OSError) as error:
                if self._connected or pause_s == self._timings.first_retry_s:
                    logger.warning("Redis is away (%s); serving goes on without it", error)
                self._connected = False
                # Whatever was in flight may or may not have arrived.
                self._next_sequence += 1
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, self._timings.longest_retry_s)

    async def withdraw(self) -> None:
        """Removes this worker from Redis; called after `run` was cancelled."""
        ref = self._record.ref
        pipe = self._redis.pipeline(transaction=True)
        pipe.srem(self._keys.workers, ref.worker_id)
        pipe.delete(
            self._keys.worker(ref.worker_id),
            self._keys.load(ref.worker_id),
            self._keys.kv_stream(ref),
            self._keys.blocks(ref),
        )
        pipe.publish(self._keys.announce, ref.worker_id)
        try:
            async with asyncio.timeout(REPLY_DEADLINE_S):
                await pipe.execute()
        except (RedisError, OSError) as error:
            logger.warning("could not deregister (%s); the record will expire", error)

    async def _publish_all(self) -> None:
        ref, keys = self._record.ref, self._keys
        hashes = self._inventory.start_over()
        upload = f"{keys.blocks(ref)}:upload"
        await self._redis.delete(upload)
        for start in range(0, len(hashes), UPLOAD_CHUNK):
            await self._redis.sadd(upload, *hashes[start : start + UPLOAD_CHUNK])
        pipe = self._redis.pipeline(transaction=True)
        pipe.delete(keys.kv_stream(ref), keys.blocks(ref))
        if hashes:
            pipe.rename(upload, keys.blocks(ref))
        self._add_batch(pipe, [])
        self._add_heartbeat(pipe)
        pipe.publish(keys.announce, ref.worker_id)
        await pipe.execute()

    async def _keep_current(self) -> None:
        """Returns when Redis turns out to have lost this worker's keys."""
        refresh_at_s = time.monotonic() + self._timings.refresh_s
        while True:
            if await self._wait_for_change(refresh_at_s - time.monotonic()):
                # A step's worth of events becomes one batch.
                await asyncio.sleep(self._timings.gather_s)
                async with asyncio.timeout(UPLOAD_DEADLINE_S):
                    await self._publish_changes()
            if time.monotonic() >= refresh_at_s:
                refresh_at_s = time.monotonic() + self._timings.refresh_s
                if not await self._refresh():
                    self._next_sequence += 1
                    return

    async def _wait_for_change(self, timeout_s: float) -> bool:
        try:
            async with asyncio.timeout(max(timeout_s, 0.0)):
                await self._changed.wait()
        except TimeoutError:
            return False
        return True

    async def _publish_changes(self) -> None:
        self._changed.clear()
        events = self._inventory.take_changes()
        if events is None:
            self._next_sequence += 1
            await self._publish_all()
            return
        blocks = self._keys.blocks(self._record.ref)
        pipe = self._redis.pipeline(transaction=True)
        for event in events:
            match event:
                case BlocksStored(_, hashes) if hashes:
                    pipe.sadd(blocks, *hashes)
                case BlocksRemoved(hashes) if hashes:
                    pipe.srem(blocks, *hashes)
                case BlocksCleared():
                    pipe.delete(blocks)
                case _:
                    pass  # an empty list, which SADD and SREM don't take
        self._add_batch(pipe, events)
        pipe.pexpire(blocks, round(1000 * self._timings.blocks_ttl_s))
        await pipe.execute()

    async def _refresh(self) -> bool:
        """False if Redis has lost keys, be it by a flush, eviction or failover."""
        num_blocks = None if self._inventory.has_changes else len(self._inventory)
        pipe = self._redis.pipeline(transaction=True)
        pipe.exists(self._keys.kv_stream(self._record.ref))
        pipe.scard(self._keys.blocks(self._record.ref))
        self._add_heartbeat(pipe)
        async with asyncio.timeout(REPLY_DEADLINE_S):
            has_stream, num_published, *_ = await pipe.execute()
        return bool(has_stream) and num_blocks in (None, num_published)

    def _add_batch(self, pipe: Pipeline, events: list[KVEvent]) -> None:
        sequence = self._next_sequence
        self._next_sequence += 1
        batch = KVEventBatch(self._record.ref.incarnation, sequence, events)
        pipe.xadd(
            self._keys.kv_stream(self._record.ref),
            {BATCH_FIELD: msgspec.msgpack.encode(batch)},
            id=entry_id(sequence),
            maxlen=STREAM_LENGTH,
            approximate=True,
        )

    def _add_heartbeat(self, pipe: Pipeline) -> None:
        ref, keys = self._record.ref, self._keys
        ttl_ms = round(1000 * self._timings.record_ttl_s)
        blocks_ttl_ms = round(1000 * self._timings.blocks_ttl_s)
        pipe.sadd(keys.workers, ref.worker_id)
        pipe.set(keys.worker(ref.worker_id), self._record_json, px=ttl_ms)
        pipe.set(keys.load(ref.worker_id), msgspec.json.encode(self._load), px=ttl_ms)
        pipe.pexpire(keys.blocks(ref), blocks_ttl_ms)
        pipe.pexpire(keys.kv_stream(ref), blocks_ttl_ms)
