"""Settings that all routers have, through changes at once and losses of Redis."""

import asyncio
import random
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio
import redis.asyncio
from redis_process import RedisServer
from unreadable import NESTED_JSON

from services.router.admin.live_settings import LiveSettings
from services.router.admin.shared_settings import SharedSettings
from services.router.config import RouterConfig


@pytest_asyncio.fixture
async def client(redis_server: RedisServer) -> AsyncIterator[redis.asyncio.Redis]:
    async with redis.asyncio.Redis.from_url(redis_server.url) as client:
        yield client


class Router:
    """One router's settings."""

    def __init__(self, client: redis.asyncio.Redis, **flags: int) -> None:
        self.live = LiveSettings(RouterConfig(**flags), lambda _: None)
        self.shared = SharedSettings(client, self.live)

    def __getitem__(self, name: str) -> object:
        return self.live.public()[name]


async def test_changes_at_once_all_count_and_routers_agree(client: redis.asyncio.Redis) -> None:
    routers = [Router(client) for _ in range(4)]
    names = ("max_attempts", "max_queued_requests", "queue_timeout_s", "request_timeout_s")
    chosen = random.Random(0)
    changes = [{chosen.choice(names): chosen.randint(1, 99)} for _ in range(60)]
    await asyncio.gather(
        *(routers[i % 4].shared.change(change) for i, change in enumerate(changes)),
        *(router.shared.read() for router in routers * 5),
    )
    for router in routers:
        await router.shared.read()
    assert len({str(router.live.public()) for router in routers}) == 1
    assert {name for change in changes for name in change} == {*routers[0].live.changes}


async def test_each_keeps_the_flags_that_nobody_changed(client: redis.asyncio.Redis) -> None:
    one, two = Router(client, max_attempts=5), Router(client, max_attempts=6)
    await one.shared.change({"max_queued_requests": 3})
    await two.shared.read()
    assert [r["max_attempts"] for r in (one, two)] == [5, 6]
    assert [r["max_queued_requests"] for r in (one, two)] == [3, 3]


async def test_an_emptied_redis_gets_the_newest_again(client: redis.asyncio.Redis) -> None:
    one, two = Router(client), Router(client)
    await one.shared.change({"max_attempts": 2})
    await two.shared.change({"max_queued_requests": 3})
    await client.flushall()
    # `one` never heard of the second change, and would undo it.
    await one.shared.read()
    await two.shared.read()
    await one.shared.read()
    late = Router(client)
    await late.shared.read()
    for router in (one, two, late):
        assert (router["max_attempts"], router["max_queued_requests"]) == (2, 3)


async def test_they_end_with_the_last_router(client: redis.asyncio.Redis) -> None:
    await Router(client).shared.change({"max_attempts": 2})
    assert 0 < await client.pttl("tandem:settings") <= 60_000


async def test_what_another_version_knows_is_refused_and_not_lost(
    client: redis.asyncio.Redis,
) -> None:
    one = Router(client)
    await one.shared.change({"max_attempts": 2})
    await client.hset("tandem:settings", "colour", '"red"')
    await client.hincrby("tandem:settings", "version", 1)
    refusal = await one.shared.read()
    assert refusal is not None
    assert "colour" in refusal
    assert one["max_attempts"] == 2
    await client.flushall()
    await one.shared.read()
    assert await client.hget("tandem:settings", "colour") == b'"red"'


@pytest.mark.parametrize(
    ("value", "reason"), [(b"{", "truncated"), (b'"\xff"', "utf-8"), (NESTED_JSON, "recursion")]
)
async def test_what_is_garbled_is_refused(
    client: redis.asyncio.Redis, value: bytes, reason: str
) -> None:
    one = Router(client)
    await one.shared.change({"max_attempts": 2})
    await client.hset("tandem:settings", "max_attempts", value)
    refusal = await one.shared.read()
    assert refusal is not None
    assert reason in refusal
    assert one["max_attempts"] == 2
    await one.shared.change({"max_attempts": 3})
    assert one["max_attempts"] == 3
    assert await one.shared.read() is None


async def test_a_garbled_name_is_refused(client: redis.asyncio.Redis) -> None:
    one = Router(client)
    await one.shared.change({"max_attempts": 2})
    await client.hset("tandem:settings", b"\xff", b"1")
    assert "unknown field" in str(await one.shared.read())
    assert one["max_attempts"] == 2
