"""Brings every followed worker's block events from Redis into an index, without gaps.

1. `follow`: the newest entry's sequence number is read, then the block set (in pieces, while
   the worker goes on changing it), and the index starts from there.
2. Later batches are replayed. Adding and removing are idempotent, so those that the set's
   pieces already contained do no harm.
3. A gap, or an outage of Redis, starts at 1 again; until then the index calls it DEGRADED.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# redis-py leaves many arguments and results untyped.
import asyncio
import logging
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias, cast

import msgspec
from redis.asyncio import Redis
from redis.exceptions import RedisError

from protocol.block_hash import BlockHash
from protocol.decoding import decode
from protocol.errors import UnreadableError
from protocol.ids import Incarnation, WorkerId, WorkerRef
from protocol.records import KVEventBatch
from services.runtime.redis_client import REPLY_DEADLINE_S
from services.runtime.redis_keys import BATCH_FIELD, RedisKeys, entry_id, sequence_of

logger = logging.getLogger(__name__)

READ_ENTRIES = 256
SCAN_COUNT = 4096
SNAPSHOT_DEADLINE_S = 30.0

Entry: TypeAlias = tuple[bytes, dict[bytes, bytes]]

_batch_decoder = msgspec.msgpack.Decoder(KVEventBatch)


class BlockIndex(Protocol):
    """Where the events go: the router's prefix index."""

    def apply(self, worker_id: WorkerId, batch: KVEventBatch) -> bool:
        """False if the batch doesn't follow the last one: the worker must be resynchronised."""
        ...

    def resync(
        self,
        worker_id: WorkerId,
        incarnation: Incarnation,
        *,
        sequence: int,
        hashes: set[BlockHash],
    ) -> None:
        """The worker's blocks are `hashes`, as of batch `sequence`."""
        ...

    def degrade(self, worker_id: WorkerId) -> None:
        """Changes of this worker's blocks may be missing from now on."""
        ...


@dataclass(slots=True)
class _Followed:
    ref: WorkerRef
    cursor: str | None = None  # None: to be resynchronised


class KVFeed:
    """Reads all followed streams with one blocking command at a time."""

    def __init__(
        self,
        redis: Redis,
        index: BlockIndex,
        *,
        keys: RedisKeys | None = None,
        pause_s: float = 0.02,
        block_s: float = 0.25,
        retry_s: float = 0.5,
    ) -> None:
        self._redis = redis
        self._index = index
        self._keys = keys or RedisKeys()
        self._pause_s = pause_s
        self._block_s = block_s
        self._retry_s = retry_s
        self._followed: dict[WorkerId, _Followed] = {}
        self._added = asyncio.Event()

    def follow(self, ref: WorkerRef) -> None:
        """Starts on this incarnation; an older one of the same worker is dropped."""
        followed = self._followed.get(ref.worker_id)
        if followed is None or followed.ref.incarnation != ref.incarnation:
            self._followed[ref.worker_id] = _Followed(ref)
            self._added.set()

    def unfollow(self, worker_id: WorkerId) -> None:
        self._followed.pop(worker_id, None)

    async def run(self) -> None:
        """Feeds the index until cancelled; an outage of Redis isn't an error here."""
        while True:
            try:
                await self._resync_lagging()
                await self._read()
            except (RedisError, OSError):
                # The directory, which uses the same Redis, says it in the log.
                for worker_id, followed in self._followed.items():
                    followed.cursor = None
                    self._index.degrade(worker_id)
                await asyncio.sleep(self._retry_s)
            else:
                # Events of a few steps come in one reading.
                await asyncio.sleep(self._pause_s)

    async def _resync_lagging(self) -> None:
        for followed in list(self._followed.values()):
            if followed.cursor is None:
                async with asyncio.timeout(SNAPSHOT_DEADLINE_S):
                    await self._resync(followed)

    async def _resync(self, followed: _Followed) -> None:
        ref = followed.ref
        reply = await self._redis.xrevrange(self._keys.kv_stream(ref), count=1)
        newest = cast("list[Entry]", reply)
        if not newest:
            return  # it hasn't published yet, or again; the next round looks anew
        sequence = sequence_of(newest[0][0])
        hashes: set[BlockHash] = set()
        async for block_hash in self._redis.sscan_iter(self._keys.blocks(ref), count=SCAN_COUNT):
            hashes.add(block_hash)
        if self._followed.get(ref.worker_id) is followed:
            self._index.resync(ref.worker_id, ref.incarnation, sequence=sequence, hashes=hashes)
            followed.cursor = entry_id(sequence)

    async def _read(self) -> None:
        current = {
            self._keys.kv_stream(followed.ref): followed
            for followed in self._followed.values()
            if followed.cursor is not None
        }
        if not current:
            await self._wait_for_workers()
            return
        cursors = {key: followed.cursor for key, followed in current.items()}
        async with asyncio.timeout(self._block_s + REPLY_DEADLINE_S):
            reply = await self._redis.xread(
                cast("Any", cursors), count=READ_ENTRIES, block=round(1000 * self._block_s)
            )
        for key, entries in cast("list[tuple[bytes, list[Entry]]]", reply):
            self._replay(current[key.decode()], entries)

    def _replay(self, followed: _Followed, entries: list[Entry]) -> None:
        worker_id = followed.ref.worker_id
        if self._followed.get(worker_id) is not followed:
            return
        for entry, fields in entries:
            followed.cursor = entry.decode()
            try:
                batch = decode(_batch_decoder, fields[BATCH_FIELD])
            except (UnreadableError, KeyError) as error:
                logger.error("unreadable KV event of %s: %s", worker_id, error)
                self._index.degrade(worker_id)
                followed.cursor = None
                return
            if not self._index.apply(worker_id, batch):
                followed.cursor = None
                return

    async def _wait_for_workers(self) -> None:
        self._added.clear()
        try:
            async with asyncio.timeout(self._block_s):
                await self._added.wait()
        except TimeoutError:
            return
