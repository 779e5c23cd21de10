"""Several routers over one Redis do what one of them is asked to have all do."""

import asyncio
import json
import signal
import socket
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
import pytest_asyncio
import redis.asyncio
from router_process import router_process
from router_stack import DEADLINE_S, RouterStack, open_router_stack, until
from unreadable import MARK, NESTED_MSGPACK, without_utf8

from services.router.admin.orders import CountRequests, OrderGiven
from services.router.noop_worker import NoopBehaviour
from services.runtime.redis_keys import RedisKeys

pytestmark = pytest.mark.asyncio(loop_scope="module")

ENDLESS = {"prompt": "abc", "max_tokens": 400, "stream": True}


@dataclass(slots=True)
class Two:
    """One router in this process, one in another."""

    stack: RouterStack
    other: httpx.AsyncClient
    process: asyncio.subprocess.Process
    path: Path

    @property
    def clients(self) -> tuple[httpx.AsyncClient, httpx.AsyncClient]:
        return self.stack.client, self.other


@pytest_asyncio.fixture(loop_scope="module")
async def two(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Two]:
    path = tmp_path_factory.mktemp("router")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        async with open_router_stack(path) as stack:
            await stack.add_worker(behaviour=NoopBehaviour(stall_at=8))
            async with router_process(stack, path, listener) as (process, other):
                yield Two(stack, other, process, path)


async def post(client: httpx.AsyncClient, path: str, body: Any) -> httpx.Response:
    return await client.post(path, json=body)


async def settings_of(client: httpx.AsyncClient) -> dict[str, Any]:
    return (await client.get("/load_config")).json()["settings"]


def error_of(response: httpx.Response) -> tuple[int, str]:
    return response.status_code, response.json()["error"]["code"]


async def test_any_router_aborts_any_request(two: Two) -> None:
    worker = two.stack.workers[0]
    for here, there in (two.clients, two.clients[::-1]):
        async with here.stream("POST", "/v1/completions", json=ENDLESS) as response:
            request_id = response.headers["x-request-id"]
            answer = await post(there, "/abort", {"request_id": request_id})
            assert answer.json() == {
                "num_aborted": 1,
                "request_ids": [request_id],
                "num_routers": 2,
            }
            *_, error, _, _ = (await response.aread()).decode().split("\n\n")
        assert json.loads(error.removeprefix("data: "))["error"]["code"] == "request_aborted"
        await until(lambda: worker.num_running == 0)
        for client in two.clients:
            again = await post(client, "/abort", {"request_id": request_id})
            assert error_of(again) == (404, "request_not_found")


async def test_loads_are_summed_and_all_requests_aborted(two: Two) -> None:
    worker = two.stack.workers[0]
    body = ENDLESS | {"stream": False}
    asking = [
        asyncio.create_task(post(client, "/v1/completions", body))
        for client in (*two.clients, two.other)
    ]
    await until(lambda: worker.num_running == 3)
    for client in two.clients:
        load = (await client.get("/load")).json()
        assert load["server_load"] == 3
        assert sorted(load["routers"].values()) == [1, 2]
        assert load["is_whole"]
    answer = (await post(two.stack.client, "/abort", {"abort_all": True})).json()
    assert (answer["num_aborted"], answer["num_routers"]) == (3, 2)
    for response in await asyncio.gather(*asking):
        assert error_of(response) == (499, "request_aborted")
    await until(lambda: worker.num_running == 0)
    assert (await two.other.get("/load")).json()["server_load"] == 0


async def test_settings_change_everywhere_and_hold_for_later_routers(two: Two) -> None:
    before = [await settings_of(client) for client in two.clients]
    first = {"max_attempts": 2, "request_timeout_s": 60.5}
    second = {"max_attempts": 3, "disable_log_requests": True}
    for client, changes in zip(two.clients, (first, second), strict=True):
        answer = await post(client, "/load_config", changes)
        assert answer.status_code == 200, answer.text
        assert answer.json()["num_routers"] == 2
        assert answer.json()["settings"].items() >= changes.items()
    changed = first | second
    assert [await settings_of(client) for client in two.clients] == [s | changed for s in before]
    with socket.create_server(("127.0.0.1", 0)) as listener:
        async with router_process(two.stack, two.path, listener, queue_timeout_s=9.0) as (_, third):
            settings = await settings_of(third)
            assert settings.items() >= (changed | {"queue_timeout_s": 9.0}).items()
            assert (await post(third, "/load_config", {})).json()["num_routers"] == 3


@pytest.mark.parametrize(
    "payload",
    [
        b"\xc1",
        without_utf8(msgspec.msgpack.encode(OrderGiven(MARK, CountRequests()))),
        NESTED_MSGPACK,
    ],
    ids=["no msgpack", "no utf-8", "nested"],
)
async def test_unreadable_orders_and_ids_are_passed_over(
    two: Two, caplog: pytest.LogCaptureFixture, payload: bytes
) -> None:
    async with redis.asyncio.Redis.from_url(two.stack.redis_url) as client:
        await client.sadd(RedisKeys().routers, b"\xff")
        assert await client.publish(RedisKeys().orders, payload) == 2
        for asked in two.clients:
            assert (await asked.get("/load")).json()["is_whole"]
        await client.srem(RedisKeys().routers, b"\xff")
    [logged] = [each for each in caplog.messages if "an order or answer" in each]
    assert "can't be read: " in logged


async def test_bad_settings_change_nothing_anywhere(two: Two) -> None:
    before = [await settings_of(client) for client in two.clients]
    bad = await post(two.other, "/load_config", {"max_attempts": 2, "port": 1})
    assert error_of(bad) == (400, "fixed_setting")
    assert [await settings_of(client) for client in two.clients] == before


async def test_a_router_that_does_not_answer_is_named(two: Two) -> None:
    async with redis.asyncio.Redis.from_url(two.stack.redis_url) as client:
        await client.sadd("tandem:routers", "router-mute")
        await client.set("tandem:router:router-mute", b"")
    answers = await asyncio.gather(
        post(two.other, "/load_config", {"max_attempts": 9}),
        post(two.stack.client, "/abort", {"abort_all": True}),
        post(two.stack.client, "/abort", {"request_id": "cmpl-x"}),
        two.stack.client.get("/load"),
    )
    *refused, load = answers
    for answer in refused:
        assert error_of(answer) == (503, "router_silent")
        assert "router-mute" in answer.json()["error"]["message"]
    assert [(await settings_of(client))["max_attempts"] for client in two.clients] == [9, 9]
    assert load.json()["routers"]["router-mute"] is None
    assert not load.json()["is_whole"]


async def test_a_dead_router_is_not_waited_for(two: Two) -> None:
    two.process.kill()
    await two.process.wait()
    answer = (await post(two.stack.client, "/load_config", {"max_attempts": 2})).json()
    assert answer["num_routers"] == 1
    nobody = await post(two.stack.client, "/abort", {"request_id": "cmpl-x"})
    assert error_of(nobody) == (404, "request_not_found")


async def test_a_router_that_ends_leaves_at_once(two: Two) -> None:
    two.process.terminate()
    await two.process.wait()
    async with redis.asyncio.Redis.from_url(two.stack.redis_url) as client:
        assert len(await client.smembers("tandem:routers")) == 1


async def test_one_that_starts_clears_away_the_dead(two: Two) -> None:
    async with redis.asyncio.Redis.from_url(two.stack.redis_url) as client:
        await client.sadd("tandem:routers", *(f"router-dead-{i}" for i in range(3)))
        with socket.create_server(("127.0.0.1", 0)) as listener:
            async with router_process(two.stack, two.path, listener):
                async with asyncio.timeout(DEADLINE_S):
                    while await client.scard("tandem:routers") != 3:  # noqa: ASYNC110
                        await asyncio.sleep(0.01)
                assert not any(b"dead" in each for each in await client.smembers("tandem:routers"))


async def test_a_stalled_router_takes_what_it_missed(two: Two) -> None:
    async with two.other.stream("POST", "/v1/completions", json=ENDLESS) as response:
        request_id = response.headers["x-request-id"]
        two.process.send_signal(signal.SIGSTOP)
        # It's gone from Redis before the deadline, and so nobody is waited for.
        missed = await post(two.stack.client, "/load_config", {"max_attempts": 7})
        assert missed.json()["num_routers"] == 1
        absent = await post(two.stack.client, "/abort", {"request_id": request_id})
        assert error_of(absent) == (404, "request_not_found")
        two.process.send_signal(signal.SIGCONT)
        assert "request_aborted" in (await response.aread()).decode()
    async with asyncio.timeout(DEADLINE_S):
        while (await settings_of(two.other))["max_attempts"] != 7:  # noqa: ASYNC110
            await asyncio.sleep(0.02)


async def test_without_redis_nothing_is_half_done(two: Two) -> None:
    worker = two.stack.workers[0]
    async with two.other.stream("POST", "/v1/completions", json=ENDLESS) as response:
        request_id = response.headers["x-request-id"]
        two.stack.kill_redis()
        await two.stack.redis.wait()
        before = [await settings_of(client) for client in two.clients]
        for client in two.clients:
            changed = await post(client, "/load_config", {"max_attempts": 2})
            assert error_of(changed) == (503, "redis_unavailable")
            aborted = await post(client, "/abort", {"abort_all": True})
            assert error_of(aborted) == (503, "redis_unavailable")
        assert [await settings_of(client) for client in two.clients] == before
        absent = await post(two.stack.client, "/abort", {"request_id": request_id})
        assert error_of(absent) == (503, "redis_unavailable")
        load = (await two.stack.client.get("/load")).json()
        assert (load["server_load"], load["is_whole"]) == (0, False)
        # Its own router needs no other.
        answer = await post(two.other, "/abort", {"request_id": request_id})
        assert answer.json()["request_ids"] == [request_id]
        assert "request_aborted" in (await response.aread()).decode()
    await until(lambda: worker.num_running == 0)
