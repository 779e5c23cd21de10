"""Two routers that tell each other, through a real Redis, what they have placed."""

import asyncio

import msgspec
import pytest
from unreadable import MARK, NESTED_MSGPACK, without_utf8

from protocol.ids import RequestKey
from services.router.placement.ledger import NO_WORK, PlacedWork, PlacementLedger
from services.router.placement.reservations import PlacedSums, SharedReservations
from services.runtime.redis_client import open_redis
from services.runtime.redis_keys import RedisKeys

PATIENCE_S = 20.0


async def until(ledger: PlacementLedger, worker_id: str, expected: PlacedWork) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while ledger.pending(worker_id) != expected:  # noqa: ASYNC110  (a value, not an event)
            await asyncio.sleep(0.005)


def place(ledger: PlacementLedger, name: str) -> None:
    ledger.placed(
        RequestKey(name, 1), prefill="p", decode="d", num_prefill_tokens=100, num_blocks=7
    )


@pytest.mark.parametrize("restart", [False, True])
async def test_each_router_counts_the_others_placements(redis_server, *, restart: bool) -> None:
    redis = open_redis(redis_server.url)
    a, b = PlacementLedger(foreign_ttl_s=PATIENCE_S), PlacementLedger(foreign_ttl_s=PATIENCE_S)
    async with asyncio.TaskGroup() as tasks:
        running = [
            tasks.create_task(
                SharedReservations(redis, ledger, router_id=name, repeat_s=0.05, retry_s=0.05).run()
            )
            for name, ledger in (("router-a", a), ("router-b", b))
        ]
        if restart:
            redis_server.kill()
            redis_server.start()
        place(a, "one")
        await until(b, "p", PlacedWork(100, 1, 0))
        await until(b, "d", PlacedWork(0, 1, 7))
        place(b, "two")
        await until(a, "d", PlacedWork(0, 2, 14))
        a.ended(RequestKey("one", 1))
        b.ended(RequestKey("two", 1))
        await until(b, "d", NO_WORK)
        await until(a, "d", NO_WORK)
        for task in running:
            task.cancel()
    await redis.aclose()


async def test_unreadable_placements_are_passed_over(
    redis_server, caplog: pytest.LogCaptureFixture
) -> None:
    redis = open_redis(redis_server.url)
    ledger = PlacementLedger(foreign_ttl_s=PATIENCE_S)
    sound = msgspec.msgpack.encode(PlacedSums("router-b", {"d": PlacedWork(0, 1, 7)}))
    no_utf8 = without_utf8(msgspec.msgpack.encode(PlacedSums(MARK, {})))
    listening = asyncio.create_task(SharedReservations(redis, ledger, router_id="router-a").run())
    async with asyncio.timeout(PATIENCE_S):
        while not await redis.publish(RedisKeys().placed, b"\xc1"):  # noqa: ASYNC110  (no event)
            await asyncio.sleep(0.005)
    for payload in (no_utf8, NESTED_MSGPACK, sound):
        await redis.publish(RedisKeys().placed, payload)
    await until(ledger, "d", PlacedWork(0, 1, 7))
    assert [text.split(":")[0] for text in caplog.messages] == [
        "unreadable placements of another router"
    ] * 3
    listening.cancel()
    await redis.aclose()
