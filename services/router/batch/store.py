"""Batches in Redis: records, results, and the lease that says which router runs one.

Whatever a runner writes, Redis takes only while the lease is the runner's: one that was stalled
beyond its lease can't disturb its successor.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# redis-py leaves many arguments and results untyped.
import asyncio
from collections.abc import AsyncIterator, Mapping
from typing import Any, cast

import msgspec
from redis.asyncio import Redis

from protocol.decoding import decode
from protocol.errors import TandemError
from services.router.batch.records import BatchProgress, BatchRecord
from services.router.batch.storage import RecordIndex
from services.router.http.pages import PageQuery
from services.runtime.redis_client import REPLY_DEADLINE_S
from services.runtime.redis_keys import RedisKeys, member_id

BUCKET_LINES = 256

_SAVE = """
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
redis.call('SET', KEYS[2], ARGV[2], 'EX', ARGV[3])
if ARGV[4] ~= '' then redis.call('SREM', KEYS[3], ARGV[4]) end
return 1
"""
_PUT_RESULT = """
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
if redis.call('HSETNX', KEYS[2], ARGV[2], ARGV[3]) == 1 then
  for i = 5, #ARGV, 2 do redis.call('HINCRBY', KEYS[3], ARGV[i], ARGV[i + 1]) end
  redis.call('EXPIRE', KEYS[2], ARGV[4])
  redis.call('EXPIRE', KEYS[3], ARGV[4])
end
return 1
"""
_RENEW = "return redis.call('GET', KEYS[1]) == ARGV[1] and redis.call('PEXPIRE', KEYS[1], ARGV[2])"
_RELEASE = "return redis.call('GET', KEYS[1]) == ARGV[1] and redis.call('DEL', KEYS[1])"


class LeaseLostError(TandemError):
    """Somebody else may run the batch by now."""


class Result(msgspec.Struct, frozen=True, array_like=True):
    """One line's result, encoded for the output file or, if it failed, for the error file."""

    failed: bool
    line: bytes


class BatchStore:
    """All batches of a stack. Everything raises RedisError and OSError."""

    def __init__(self, redis: Redis, keys: RedisKeys, *, runner_id: str, ttl_s: int) -> None:
        """`runner_id` is this router's, in this life; a batch is kept for `ttl_s` behind its
        completion window."""
        self._redis = redis
        self._keys = keys
        self._runner_id = runner_id
        self._ttl_s = ttl_s
        self._index = RecordIndex(redis, BatchRecord, index=keys.batches, record_key=keys.batch)

    async def create(self, record: BatchRecord) -> None:
        value = msgspec.json.encode(record)
        await self._redis.set(self._keys.batch(record.id), value, ex=self._kept_s(record))
        await self._index.add(record.id)
        await cast("Any", self._redis.sadd(self._keys.open_batches, record.id))

    async def get(self, batch_id: str) -> BatchRecord | None:
        """Raises UnreadableError, too."""
        return await self._index.get(batch_id)

    async def page(self, query: PageQuery) -> tuple[list[BatchRecord], bool]:
        return await self._index.page(query)

    async def progress(self, batch_id: str) -> BatchProgress:
        pipe = self._redis.pipeline(transaction=False)
        pipe.get(self._keys.batch_part(batch_id, "cancel"))
        pipe.hgetall(self._keys.batch_part(batch_id, "counts"))
        async with asyncio.timeout(REPLY_DEADLINE_S):
            cancel, counts = await pipe.execute()
        numbers = {name.decode(): int(value) for name, value in counts.items()}
        return BatchProgress(cancelling_at=None if cancel is None else int(cancel), **numbers)

    async def cancel(self, record: BatchRecord, *, now: float) -> None:
        """Whoever runs the batch will see it; a second call changes nothing."""
        key = self._keys.batch_part(record.id, "cancel")
        await self._redis.set(key, int(now), nx=True, ex=self._kept_s(record))

    async def open_ids(self) -> list[str]:
        """Batches that have still to be run or finished."""
        async with asyncio.timeout(REPLY_DEADLINE_S):
            members = await cast("Any", self._redis.smembers(self._keys.open_batches))
        return sorted(map(member_id, members))

    async def forget(self, batch_id: str) -> None:
        """There is nothing to run any more: the record has expired, or says so."""
        async with asyncio.timeout(REPLY_DEADLINE_S):
            await cast("Any", self._redis.srem(self._keys.open_batches, batch_id))

    # For the router that runs the batch:

    async def try_lease(self, batch_id: str, *, ttl_s: float) -> bool:
        key = self._keys.batch_part(batch_id, "lease")
        async with asyncio.timeout(REPLY_DEADLINE_S):
            return bool(
                await self._redis.set(key, self._runner_id, nx=True, px=round(1000 * ttl_s))
            )

    async def renew_lease(self, batch_id: str, *, ttl_s: float) -> None:
        """Raises LeaseLostError."""
        key = self._keys.batch_part(batch_id, "lease")
        if not await self._eval(_RENEW, [key], [self._runner_id, round(1000 * ttl_s)]):
            raise LeaseLostError(f"the lease of {batch_id} ended")

    async def release_lease(self, batch_id: str) -> None:
        key = self._keys.batch_part(batch_id, "lease")
        await self._eval(_RELEASE, [key], [self._runner_id])

    async def save(self, record: BatchRecord) -> None:
        """Raises LeaseLostError."""
        keys = [
            self._keys.batch_part(record.id, "lease"),
            self._keys.batch(record.id),
            self._keys.open_batches,
        ]
        value = msgspec.json.encode(record)
        closed = record.id if record.is_over else ""
        arguments = [self._runner_id, value, self._kept_s(record), closed]
        if not await self._eval(_SAVE, keys, arguments):
            raise LeaseLostError(f"the lease of {record.id} ended")

    async def put_result(
        self, record: BatchRecord, number: int, result: Result, counts: Mapping[str, int]
    ) -> None:
        """Keeps line `number`'s result and adds `counts`, unless there is one already.

        Raises LeaseLostError.
        """
        keys = [
            self._keys.batch_part(record.id, part)
            for part in ("lease", f"results:{number // BUCKET_LINES}", "counts")
        ]
        value = msgspec.msgpack.encode(result)
        arguments: list[str | int | bytes] = [
            self._runner_id,
            number,
            value,
            self._kept_s(record),
        ]
        for name, count in counts.items():
            arguments += [name, count]
        if not await self._eval(_PUT_RESULT, keys, arguments):
            raise LeaseLostError(f"the lease of {record.id} ended")

    async def done_lines(self, record: BatchRecord) -> set[int]:
        """Numbers of the lines that have results."""
        done: set[int] = set()
        for key in self._result_keys(record):
            async with asyncio.timeout(REPLY_DEADLINE_S):
                done.update(int(name) for name in await cast("Any", self._redis.hkeys(key)))
        return done

    async def results(self, record: BatchRecord) -> AsyncIterator[Result]:
        """In the order of the input's lines. Raises UnreadableError, too."""
        decoder = msgspec.msgpack.Decoder(Result)
        for key in self._result_keys(record):
            async with asyncio.timeout(REPLY_DEADLINE_S):
                bucket = await cast("Any", self._redis.hgetall(key))
            for number in sorted(bucket, key=int):
                yield decode(decoder, bucket[number])

    async def forget_results(self, record: BatchRecord) -> None:
        async with asyncio.timeout(REPLY_DEADLINE_S):
            await self._redis.unlink(*self._result_keys(record))

    def _result_keys(self, record: BatchRecord) -> list[str]:
        return [
            self._keys.batch_part(record.id, f"results:{bucket}")
            for bucket in range(record.num_lines // BUCKET_LINES + 1)
        ]

    def _kept_s(self, record: BatchRecord) -> int:
        return record.expires_at - record.created_at + self._ttl_s

    async def _eval(self, script: str, keys: list[str], arguments: list[Any]) -> bool:
        async with asyncio.timeout(REPLY_DEADLINE_S):
            return bool(await cast("Any", self._redis.eval(script, len(keys), *keys, *arguments)))
