"""Files in Redis, in chunks, so that no value is large; they vanish when their time is over."""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# redis-py leaves many arguments and results untyped.
import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Callable
from typing import Any, cast

import msgspec
from redis.asyncio import Redis

from protocol.errors import TandemError
from services.router.batch.storage import RecordIndex
from services.router.http.pages import PageQuery
from services.runtime.redis_client import REPLY_DEADLINE_S
from services.runtime.redis_keys import RedisKeys

CHUNK_BYTES = 256 * 2**10
# What a router that died in an upload leaves behind.
_UNFINISHED_TTL_S = 3600


class FileGoneError(TandemError):
    """A file that was there when its reading began was deleted or has expired."""


class FileRecord(msgspec.Struct, frozen=True, kw_only=True):
    """Redis `file:{id}`, and what the API says about a file, less `num_chunks`."""

    id: str
    bytes: int
    created_at: int
    expires_at: int
    filename: str
    purpose: str
    num_chunks: int

    def view(self) -> dict[str, Any]:
        fields = msgspec.to_builtins(self)
        del fields["num_chunks"]
        return fields | {"object": "file", "status": "processed", "status_details": None}


class FileStore:
    """All files of a stack."""

    def __init__(self, redis: Redis, keys: RedisKeys, *, ttl_s: int) -> None:
        """`ttl_s` is the life of files that don't say how long they are wanted."""
        self._redis = redis
        self._keys = keys
        self.ttl_s = ttl_s
        self._index = RecordIndex(redis, FileRecord, index=keys.files, record_key=keys.file)

    def writer(self) -> "FileWriter":
        """A new file, which nobody sees before it's finished."""
        return FileWriter(self._redis, self._keys, self._index)

    async def get(self, file_id: str) -> FileRecord | None:
        """Raises UnreadableError, RedisError and OSError."""
        return await self._index.get(file_id)

    async def page(
        self, query: PageQuery, *, wanted: Callable[[FileRecord], bool] = lambda _: True
    ) -> tuple[list[FileRecord], bool]:
        return await self._index.page(query, wanted=wanted)

    async def delete(self, record: FileRecord) -> None:
        await self._redis.unlink(self._keys.file(record.id))
        await self._index.remove(record.id)
        await _unlink_chunks(self._redis, self._keys, record.id, record.num_chunks)

    async def chunks(self, record: FileRecord) -> AsyncIterator[bytes]:
        """Raises FileGoneError, RedisError and OSError."""
        for index in range(record.num_chunks):
            async with asyncio.timeout(REPLY_DEADLINE_S):
                chunk = await self._redis.get(self._keys.file_chunk(record.id, index))
            if chunk is None:
                raise FileGoneError(f"The file `{record.id}` is gone.")
            yield cast("bytes", chunk)

    async def lines(self, record: FileRecord) -> AsyncIterator[tuple[int, bytes]]:
        """Lines that aren't blank with their numbers, from 1. Raises as `chunks` does."""
        number = 0
        # A list: a line may go on for many chunks.
        unended: list[bytes] = []
        async for chunk in self.chunks(record):
            first, *others = chunk.split(b"\n")
            unended.append(first)
            for following in others:
                number += 1
                if line := b"".join(unended).strip():
                    yield number, line
                unended = [following]
        if line := b"".join(unended).strip():
            yield number + 1, line


class FileWriter:
    """Await `write` for the content, then `finish`, or `discard`."""

    def __init__(self, redis: Redis, keys: RedisKeys, index: RecordIndex[FileRecord]) -> None:
        self.file_id = f"file-{secrets.token_hex(12)}"
        self.num_bytes = 0
        self._redis = redis
        self._keys = keys
        self._index = index
        self._num_chunks = 0
        self._buffer = bytearray()

    async def write(self, data: bytes) -> None:
        """Raises RedisError and OSError."""
        self.num_bytes += len(data)
        self._buffer += data
        while len(self._buffer) >= CHUNK_BYTES:
            await self._store(bytes(self._buffer[:CHUNK_BYTES]))
            del self._buffer[:CHUNK_BYTES]

    async def finish(self, *, filename: str, purpose: str, ttl_s: int) -> FileRecord:
        """From now on the file can be read. Raises RedisError and OSError."""
        if self._buffer:
            await self._store(bytes(self._buffer))
        created_at = int(time.time())
        record = FileRecord(
            id=self.file_id,
            bytes=self.num_bytes,
            created_at=created_at,
            expires_at=created_at + ttl_s,
            filename=filename,
            purpose=purpose,
            num_chunks=self._num_chunks,
        )
        pipe = self._redis.pipeline(transaction=True)
        for index in range(self._num_chunks):
            pipe.expire(self._keys.file_chunk(self.file_id, index), ttl_s)
        pipe.set(self._keys.file(self.file_id), msgspec.json.encode(record), ex=ttl_s)
        async with asyncio.timeout(REPLY_DEADLINE_S):
            await pipe.execute()
            await self._index.add(self.file_id)
        return record

    async def discard(self) -> None:
        await self._redis.unlink(self._keys.file(self.file_id))
        await self._index.remove(self.file_id)
        await _unlink_chunks(self._redis, self._keys, self.file_id, self._num_chunks)

    async def _store(self, chunk: bytes) -> None:
        key = self._keys.file_chunk(self.file_id, self._num_chunks)
        self._num_chunks += 1
        async with asyncio.timeout(REPLY_DEADLINE_S):
            await self._redis.set(key, chunk, ex=_UNFINISHED_TTL_S)


async def _unlink_chunks(redis: Redis, keys: RedisKeys, file_id: str, num_chunks: int) -> None:
    if num_chunks:
        async with asyncio.timeout(REPLY_DEADLINE_S):
            await redis.unlink(*(keys.file_chunk(file_id, i) for i in range(num_chunks)))
