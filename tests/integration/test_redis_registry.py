"""Workers' registration, discovery and KV events through a real Redis that comes and goes."""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import suppress
from typing import Any

import msgspec
import pytest
from redis.asyncio import Redis
from unreadable import MARK, NESTED_JSON, NESTED_MSGPACK, without_utf8

from cli.registered_workers import RegisteredWorkers
from protocol.ids import Incarnation, WorkerId, WorkerRef, WorkerRole
from protocol.layout import KVLayout
from protocol.messages import PROTOCOL_VERSION
from protocol.records import (
    BlocksCleared,
    BlocksRemoved,
    BlocksStored,
    KVEventBatch,
    WorkerLoad,
    WorkerRecord,
)
from services.runtime.directory import Records, WorkerDirectory, read_loads, read_records
from services.runtime.kv_feed import KVFeed
from services.runtime.redis_client import open_redis
from services.runtime.redis_keys import BATCH_FIELD, RedisKeys, entry_id
from services.runtime.registry import RegistryTimings, WorkerRegistration

# Far above what anything here needs; only a bug waits so long.
PATIENCE_S = 30.0
LAYOUT = KVLayout("model", 2, 2, 16, 16, "float32")


def record(worker_id: WorkerId = "decode-0", incarnation: Incarnation = 1) -> WorkerRecord:
    return WorkerRecord(
        protocol_version=PROTOCOL_VERSION,
        ref=WorkerRef(worker_id, incarnation, "tcp://127.0.0.1:1"),
        role=WorkerRole.DECODE,
        model="model",
        layout=LAYOUT,
        num_blocks=100,
        max_num_seqs=8,
        max_num_batched_tokens=512,
        max_model_len=1024,
        metrics_address="http://127.0.0.1:2",
        pid=1,
        hostname="host",
    )


def block(number: int) -> bytes:
    return number.to_bytes(16, "little")


def stored(*numbers: int) -> BlocksStored:
    return BlocksStored(bytes(16), [block(number) for number in numbers])


class Watched:
    """State that tests wait on."""

    def __init__(self) -> None:
        self._changed = asyncio.Event()

    def touch(self) -> None:
        self._changed.set()

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(PATIENCE_S):
            while not condition():
                self._changed.clear()
                await self._changed.wait()


class SeenRecords(Watched):
    def __init__(self) -> None:
        super().__init__()
        self.records: Records = {}

    def __call__(self, records: Records) -> None:
        self.records = records
        self.touch()


class MirrorIndex(Watched):
    """The simplest BlockIndex: one worker's blocks, as a set."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks: set[bytes] = set()
        self.sequence: int | None = None
        self.num_resyncs = 0
        self.exact = False

    def apply(self, worker_id: WorkerId, batch: KVEventBatch) -> bool:
        assert self.sequence is not None
        if batch.sequence != self.sequence + 1:
            self.exact = False
            return False
        self.sequence = batch.sequence
        for event in batch.events:
            match event:
                case BlocksStored(_, hashes):
                    self.blocks.update(hashes)
                case BlocksRemoved(hashes):
                    self.blocks.difference_update(hashes)
                case BlocksCleared():
                    self.blocks.clear()
        self.touch()
        return True

    def resync(
        self,
        worker_id: WorkerId,
        incarnation: Incarnation,
        *,
        sequence: int,
        hashes: set[bytes],
    ) -> None:
        self.blocks, self.sequence, self.exact = set(hashes), sequence, True
        self.num_resyncs += 1
        self.touch()

    def degrade(self, worker_id: WorkerId) -> None:
        self.exact = False
        self.touch()


@pytest.fixture
async def redis(redis_server) -> AsyncIterator[Redis]:
    client = open_redis(redis_server.url)
    yield client
    await client.aclose()


class Runner:
    """Background work that ends with the test, or before it."""

    def __init__(self) -> None:
        self._tasks: list[asyncio.Task[None]] = []

    def start(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        self._tasks.append(asyncio.create_task(work))
        return self._tasks[-1]

    async def stop(self, task: asyncio.Task[None]) -> None:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task

    async def stop_all(self) -> None:
        for task in self._tasks:
            await self.stop(task)


@pytest.fixture
async def runner(redis: Redis) -> AsyncIterator[Runner]:
    runner = Runner()
    yield runner
    await runner.stop_all()


async def test_a_worker_is_seen_when_it_comes_and_when_it_leaves(
    redis: Redis, runner: Runner
) -> None:
    seen = SeenRecords()
    runner.start(WorkerDirectory(redis, seen).run())
    registration = WorkerRegistration(redis, record())
    running = runner.start(registration.run())
    await seen.until(lambda: seen.records == {"decode-0": record()})
    await runner.stop(running)
    await registration.withdraw()
    await seen.until(lambda: not seen.records)
    assert await redis.keys() == []


async def test_a_directory_that_starts_later_sees_who_is_there(
    redis: Redis, runner: Runner
) -> None:
    registration = WorkerRegistration(redis, record())
    registration.update_load(WorkerLoad(num_running=3))
    runner.start(registration.run())
    seen = SeenRecords()
    runner.start(WorkerDirectory(redis, seen).run())
    await seen.until(lambda: "decode-0" in seen.records)
    loads = await read_loads(redis, RedisKeys(), ["decode-0", "nobody"])
    assert loads == {"decode-0": WorkerLoad(num_running=3)}


async def test_a_killed_worker_expires(redis: Redis, runner: Runner) -> None:
    seen = SeenRecords()
    runner.start(WorkerDirectory(redis, seen).run())
    timings = RegistryTimings(refresh_s=0.1, record_ttl_s=0.5)
    running = runner.start(WorkerRegistration(redis, record(), timings=timings).run())
    await seen.until(lambda: "decode-0" in seen.records)
    await runner.stop(running)
    await seen.until(lambda: not seen.records)


async def test_stacks_in_different_namespaces_do_not_meet(redis: Redis, runner: Runner) -> None:
    mine, theirs = RedisKeys("mine"), RedisKeys("theirs")
    seen = SeenRecords()
    runner.start(WorkerDirectory(redis, seen, keys=mine).run())
    runner.start(WorkerRegistration(redis, record("a"), keys=theirs).run())
    runner.start(WorkerRegistration(redis, record("b"), keys=mine).run())
    await seen.until(lambda: bool(seen.records))
    assert set(seen.records) == {"b"}


async def test_records_of_other_versions_are_ignored_and_named(
    redis: Redis, caplog: pytest.LogCaptureFixture
) -> None:
    keys = RedisKeys()
    await redis.sadd(keys.workers, "new", "broken")
    await redis.set(keys.worker("new"), b'{"protocol_version": 99, "shape": "unknown"}')
    await redis.set(keys.worker("broken"), b"no json")
    assert await read_records(redis, keys) == {}
    assert f"protocol version 99, this process {PROTOCOL_VERSION}" in caplog.text
    assert "no json" in caplog.text


@pytest.mark.parametrize("value", [without_utf8(msgspec.json.encode(record(MARK))), NESTED_JSON])
async def test_unreadable_records_leave_the_others_in_sight(
    redis: Redis, runner: Runner, caplog: pytest.LogCaptureFixture, value: bytes
) -> None:
    keys = RedisKeys()
    await redis.sadd(keys.workers, "broken", b"\xff")
    await redis.set(keys.worker("broken"), value)
    seen = SeenRecords()
    runner.start(WorkerDirectory(redis, seen).run())
    runner.start(WorkerRegistration(redis, record()).run())
    await seen.until(lambda: seen.records == {"decode-0": record()})
    [refusal] = [text for text in caplog.messages if "ignored a worker's record" in text]
    assert len(refusal) < 1500


@pytest.mark.parametrize(
    "value", [b"{", b'{"transfer_gb_per_s": {"\xff": 1}}', b'{"num_running": 1e999}', NESTED_JSON]
)
async def test_an_unreadable_load_is_none(
    redis: Redis, caplog: pytest.LogCaptureFixture, value: bytes
) -> None:
    keys = RedisKeys()
    await redis.set(keys.load("broken"), value)
    await redis.set(keys.load("sound"), msgspec.json.encode(WorkerLoad(num_running=3)))
    assert await read_loads(redis, keys, ["broken", "sound"]) == {
        "sound": WorkerLoad(num_running=3)
    }
    assert await RegisteredWorkers(redis, keys=keys).load("broken") is None
    assert [text for text in caplog.messages if text.startswith("unreadable load of broken: ")]


@pytest.mark.parametrize("value", [b"\xc1", NESTED_MSGPACK])
async def test_an_unreadable_batch_of_events_is_a_gap(
    redis: Redis, runner: Runner, caplog: pytest.LogCaptureFixture, value: bytes
) -> None:
    ref, keys = record().ref, RedisKeys()

    async def publish(sequence: int, value: bytes) -> None:
        await redis.xadd(keys.kv_stream(ref), {BATCH_FIELD: value}, id=entry_id(sequence))

    def batch(sequence: int) -> bytes:
        return msgspec.msgpack.encode(KVEventBatch(ref.incarnation, sequence, [stored(sequence)]))

    index = MirrorIndex()
    feed = KVFeed(redis, index)
    feed.follow(ref)
    runner.start(feed.run())
    await publish(0, batch(0))
    await index.until(lambda: index.num_resyncs == 1)
    await publish(1, value)
    await index.until(lambda: index.num_resyncs == 2)
    await publish(2, batch(2))
    await index.until(lambda: index.sequence == 2)
    assert index.exact
    [logged] = caplog.messages
    assert logged.startswith("unreadable KV event of decode-0: ")


async def test_blocks_reach_the_index_early_and_late(redis: Redis, runner: Runner) -> None:
    registration = WorkerRegistration(redis, record())
    registration.publish_kv([stored(1, 2, 3)])
    runner.start(registration.run())
    early = MirrorIndex()
    feed = KVFeed(redis, early)
    feed.follow(record().ref)
    runner.start(feed.run())
    await early.until(lambda: early.blocks == {block(1), block(2), block(3)})
    registration.publish_kv([stored(4), BlocksRemoved([block(3)])])
    registration.publish_kv([BlocksRemoved([block(2)]), stored(5)])
    expected = {block(1), block(4), block(5)}
    await early.until(lambda: early.blocks == expected)

    late = MirrorIndex()
    late_feed = KVFeed(redis, late)
    late_feed.follow(record().ref)
    runner.start(late_feed.run())
    await late.until(lambda: late.blocks == expected)

    registration.publish_kv([BlocksCleared(), stored(9)])
    for index in (early, late):
        await index.until(lambda index=index: index.blocks == {block(9)})
        assert index.num_resyncs == 1
        assert index.exact


async def test_a_new_incarnation_has_its_own_blocks(redis: Redis, runner: Runner) -> None:
    index = MirrorIndex()
    feed = KVFeed(redis, index)
    runner.start(feed.run())
    old = WorkerRegistration(redis, record(incarnation=1))
    old.publish_kv([stored(1)])
    running = runner.start(old.run())
    feed.follow(record(incarnation=1).ref)
    await index.until(lambda: index.blocks == {block(1)})
    await runner.stop(running)

    new = WorkerRegistration(redis, record(incarnation=2))
    new.publish_kv([stored(2)])
    runner.start(new.run())
    feed.follow(record(incarnation=2).ref)
    await index.until(lambda: index.blocks == {block(2)})


async def test_everything_is_back_after_redis_was_killed(
    redis: Redis, redis_server, runner: Runner
) -> None:
    seen = SeenRecords()
    directory = WorkerDirectory(redis, seen)
    runner.start(directory.run())
    registration = WorkerRegistration(redis, record())
    registration.publish_kv([stored(1)])
    runner.start(registration.run())
    index = MirrorIndex()
    feed = KVFeed(redis, index)
    feed.follow(record().ref)
    runner.start(feed.run())
    await index.until(lambda: index.blocks == {block(1)})

    redis_server.kill()
    await index.until(lambda: not index.exact)
    assert seen.records == {"decode-0": record()}
    registration.publish_kv([stored(2), BlocksRemoved([block(1)])])
    redis_server.start()
    await index.until(lambda: index.blocks == {block(2)} and index.exact)
    await seen.until(lambda: directory.connected and "decode-0" in seen.records)
    registration.publish_kv([stored(3)])
    await index.until(lambda: index.blocks == {block(2), block(3)})


async def test_keys_that_somebody_deleted_are_written_anew(redis: Redis, runner: Runner) -> None:
    seen = SeenRecords()
    runner.start(WorkerDirectory(redis, seen).run())
    registration = WorkerRegistration(redis, record(), timings=RegistryTimings(refresh_s=0.1))
    registration.publish_kv([stored(1)])
    runner.start(registration.run())
    index = MirrorIndex()
    feed = KVFeed(redis, index)
    feed.follow(record().ref)
    runner.start(feed.run())
    await index.until(lambda: index.blocks == {block(1)})
    await redis.flushall()
    registration.publish_kv([stored(2)])
    await index.until(lambda: index.blocks == {block(1), block(2)} and index.num_resyncs == 2)
    await seen.until(lambda: "decode-0" in seen.records)


async def test_more_changes_than_are_kept_become_a_resync(redis: Redis, runner: Runner) -> None:
    registration = WorkerRegistration(redis, record())
    runner.start(registration.run())
    index = MirrorIndex()
    feed = KVFeed(redis, index)
    feed.follow(record().ref)
    runner.start(feed.run())
    await index.until(lambda: index.exact)
    many = range(70_000)
    registration.publish_kv([stored(*many)])
    await index.until(lambda: len(index.blocks) == len(many) and index.exact)
    assert index.num_resyncs == 2


async def test_another_releases_record_is_none(redis: Redis) -> None:
    """`tandem ps` lists what it can of a stack that another release has started."""
    keys = RedisKeys("other-release")
    workers = RegisteredWorkers(redis, keys=keys)
    await redis.set(keys.worker("decode-0"), msgspec.json.encode(record()))
    assert await workers.record("decode-0") == record()
    of_later_release = msgspec.json.encode(record()).replace(b'"decode"', b'"referee"')
    await redis.set(keys.worker("decode-0"), of_later_release)
    assert await workers.record("decode-0") is None
    assert await workers.load("decode-0") is None
    for broken in (without_utf8(msgspec.json.encode(record(MARK))), NESTED_JSON):
        await redis.set(keys.worker("decode-0"), broken)
        assert await workers.record("decode-0") is None
