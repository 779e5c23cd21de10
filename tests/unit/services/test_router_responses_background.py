"""Responses that run in the background: seen, cancelled and deleted from any router."""

import asyncio
import signal
import socket
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import pytest_asyncio
import redis.asyncio
from fastapi import Response
from openai import AsyncOpenAI
from router_process import router_process
from router_stack import DEADLINE_S, MODEL, RouterStack, open_router_stack, until

from protocol.errors import InvalidRequestError
from services.router.noop_worker import NoopBehaviour
from services.router.responses.background import BackgroundRun

pytestmark = pytest.mark.asyncio(loop_scope="module")

RESPONSES = "/v1/responses"
STALLS_AT = 9
ENDLESS = {"input": "abc", "background": True, "max_output_tokens": 100}
SHORT = ENDLESS | {"max_output_tokens": STALLS_AT}
ALIVE = ("queued", "in_progress")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def stack(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[RouterStack]:
    async with open_router_stack(tmp_path_factory.mktemp("router")) as stack:
        await stack.add_worker(behaviour=NoopBehaviour(stall_at=STALLS_AT))
        yield stack


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def client(stack: RouterStack) -> AsyncIterator[AsyncOpenAI]:
    async with AsyncOpenAI(base_url=f"{stack.url}/v1", api_key="none", max_retries=0) as client:
        yield client


async def ask(client: httpx.AsyncClient, body: dict[str, Any]) -> str:
    response = await client.post(RESPONSES, json=body)
    assert response.status_code == 200, response.text
    assert response.json()["status"] in ALIVE
    return response.json()["id"]


async def seen(client: httpx.AsyncClient, response_id: str) -> dict[str, Any]:
    return (await client.get(f"{RESPONSES}/{response_id}")).json()


async def until_over(client: httpx.AsyncClient, response_id: str) -> dict[str, Any]:
    async with asyncio.timeout(DEADLINE_S):
        while (answer := await seen(client, response_id))["status"] in ALIVE:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    return answer


async def until_status(client: httpx.AsyncClient, response_id: str, status: str) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while (await seen(client, response_id))["status"] != status:  # noqa: ASYNC110
            await asyncio.sleep(0.01)


async def test_it_ends_without_anybody_waiting(stack: RouterStack) -> None:
    async with httpx.AsyncClient(base_url=stack.url) as gone:
        response_id = await ask(gone, SHORT | {"metadata": {"a": "b"}})
    answer = await until_over(stack.client, response_id)
    assert (answer["status"], answer["background"]) == ("incomplete", True)
    assert answer["output"][0]["content"][0]["text"] == "user\nabc"
    assert answer["usage"]["output_tokens"] == STALLS_AT
    assert answer["metadata"] == {"a": "b"}
    at_once = (await stack.post(RESPONSES, SHORT | {"background": False})).json()
    changing = {"id", "created_at", "completed_at", "output", "background", "metadata"}
    assert {**answer, **dict.fromkeys(changing)} == {**at_once, **dict.fromkeys(changing)}


async def test_the_openai_client_polls_goes_on_cancels_and_deletes(
    stack: RouterStack, client: AsyncOpenAI
) -> None:
    options = {"model": MODEL, "background": True}
    first = await client.responses.create(input="one", max_output_tokens=STALLS_AT, **options)
    while first.status in ALIVE:
        first = await client.responses.retrieve(first.id)
    assert first.output_text == "user\none"
    second = await client.responses.create(
        input="two", previous_response_id=first.id, max_output_tokens=100, **options
    )
    await until_status(stack.client, second.id, "in_progress")
    items = [item async for item in client.responses.input_items.list(second.id)]
    assert len(items) == 3
    with pytest.raises(openai.BadRequestError) as early:
        await client.responses.create(model=MODEL, input="x", previous_response_id=second.id)
    assert early.value.code == "previous_response_not_over"
    cancelled = await client.responses.cancel(second.id)
    assert cancelled.status == "cancelled"
    assert await client.responses.cancel(second.id) == cancelled
    assert await client.responses.retrieve(second.id) == cancelled
    await until(lambda: stack.workers[0].num_running == 0)
    assert await client.responses.cancel(first.id) == first, "it's over, and stays what it is"
    await client.responses.delete(second.id)
    for gone in (client.responses.retrieve, client.responses.cancel, client.responses.delete):
        with pytest.raises(openai.NotFoundError):
            await gone(second.id)


async def test_only_background_responses_can_be_cancelled(stack: RouterStack) -> None:
    answer = (await stack.post(RESPONSES, {"input": "x", "max_output_tokens": 2})).json()
    refused = await stack.client.post(f"{RESPONSES}/{answer['id']}/cancel")
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "not_in_background")


async def test_a_deleted_one_stops(stack: RouterStack) -> None:
    response_id = await ask(stack.client, ENDLESS)
    await until(lambda: stack.workers[0].num_running == 1)
    assert (await stack.client.delete(f"{RESPONSES}/{response_id}")).json()["deleted"]
    await until(lambda: stack.workers[0].num_running == 0)
    await stack.service.background.until_idle()
    assert (await stack.client.get(f"{RESPONSES}/{response_id}")).status_code == 404


async def test_an_operators_abort_fails_it(stack: RouterStack) -> None:
    response_id = await ask(stack.client, ENDLESS)
    await stack.post("/abort", {"request_id": response_id})
    answer = await until_over(stack.client, response_id)
    assert answer["status"] == "failed"
    assert "aborted" in answer["error"]["message"]


async def test_a_lost_lease_stops_it_even_if_nobody_says_so(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    async with open_router_stack(tmp_path_factory.mktemp("router")) as stack:
        stack.service.background._renew_s = 0.05
        await stack.add_worker(behaviour=NoopBehaviour(stall_at=STALLS_AT))
        response_id = await ask(stack.client, ENDLESS)
        await until(lambda: stack.workers[0].num_running == 1)
        async with redis.asyncio.Redis.from_url(stack.redis_url) as store:
            await store.delete(f"tandem:response_runner:{response_id}")
        await until(lambda: stack.workers[0].num_running == 0)
        answer = await seen(stack.client, response_id)
        assert (answer["status"], answer["error"]["code"]) == ("failed", "server_error")


async def test_what_runs_longer_than_answers_are_kept_is_there_meanwhile(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    async with open_router_stack(tmp_path_factory.mktemp("router"), response_ttl_s=1) as stack:
        stack.service.background._renew_s = 0.05
        await stack.add_worker(behaviour=NoopBehaviour(stall_at=STALLS_AT))
        response_id = await ask(stack.client, ENDLESS)
        record = f"tandem:response:{response_id}"
        async with redis.asyncio.Redis.from_url(stack.redis_url) as store:
            assert await store.pttl(record) > 1000
            await store.pexpire(record, 1000)
            async with asyncio.timeout(DEADLINE_S):
                while await store.pttl(record) <= 1000:  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
            assert (await stack.client.post(f"{RESPONSES}/{response_id}/cancel")).is_success
            assert 0 < await store.pttl(record) <= 1000


async def test_a_waiting_client_that_is_cut_off_leaves_it_running(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """As the server does to whoever waits when its time to end is over."""
    async with open_router_stack(tmp_path_factory.mktemp("router")) as stack:
        background, may_fail = stack.service.background, asyncio.Event()

        async def ask_nothing(run: BackgroundRun) -> Response:
            await may_fail.wait()
            raise InvalidRequestError("No.", field=None)

        waiting = asyncio.create_task(background.start(ask_nothing))
        await asyncio.sleep(0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        may_fail.set()
        async with asyncio.timeout(DEADLINE_S):
            await background.until_idle()
        assert not stack.service.failed.is_set()


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"stream": True}, "stream"),
        ({"store": False}, "background"),
        ({"background": "yes"}, "background"),
        ({"temperature": -1}, "temperature"),
        ({"input": "x" * 600}, "input"),
    ],
)
async def test_what_is_wrong_is_said_at_once(
    stack: RouterStack, fields: dict[str, Any], field: str
) -> None:
    refused = await stack.post(RESPONSES, ENDLESS | fields)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, field)
    await stack.service.background.until_idle()


async def test_it_waits_in_the_queue_like_others(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    async with open_router_stack(tmp_path_factory.mktemp("router"), max_queued_requests=1) as stack:
        await stack.add_worker(behaviour=NoopBehaviour(stall_at=STALLS_AT))
        stack.service._admission._capacity = lambda: 1
        running, queued = [await ask(stack.client, ENDLESS) for _ in range(2)]
        assert (await seen(stack.client, queued))["status"] == "queued"
        assert (await stack.post(RESPONSES, ENDLESS)).status_code == 429
        assert (await stack.client.post(f"{RESPONSES}/{running}/cancel")).is_success
        await until_status(stack.client, queued, "in_progress")
        again = await ask(stack.client, ENDLESS)
        assert (await stack.client.post(f"{RESPONSES}/{again}/cancel")).is_success
        assert stack.service._admission.num_waiting == 0


async def test_a_failure_is_kept(tmp_path_factory: pytest.TempPathFactory) -> None:
    async with open_router_stack(tmp_path_factory.mktemp("router")) as stack:
        await stack.add_worker(behaviour=NoopBehaviour(refuses=True, refusal_is_retryable=False))
        answer = await until_over(stack.client, await ask(stack.client, ENDLESS))
        assert (answer["status"], answer["error"]["code"]) == ("failed", "server_error")


async def test_without_a_store_there_is_no_background(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    async with open_router_stack(tmp_path_factory.mktemp("router"), response_ttl_s=0) as stack:
        refused = await stack.post(RESPONSES, ENDLESS)
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "background")
    async with open_router_stack(tmp_path_factory.mktemp("router")) as stack:
        await stack.add_worker(behaviour=NoopBehaviour(stall_at=STALLS_AT))
        stack.kill_redis()
        await stack.redis.wait()
        refused = await stack.post(RESPONSES, ENDLESS)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "store_unavailable")
        await until(lambda: stack.workers[0].num_running == 0)


@dataclass(slots=True)
class Two:
    """One router in this process, one in another."""

    stack: RouterStack
    other: httpx.AsyncClient
    process: asyncio.subprocess.Process


@pytest_asyncio.fixture(loop_scope="module", params=[{}])
async def two(
    tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> AsyncIterator[Two]:
    path: Path = tmp_path_factory.mktemp("router")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        async with open_router_stack(path) as stack:
            await stack.add_worker(behaviour=NoopBehaviour(step_s=0.02, stall_at=50))
            async with router_process(stack, path, listener, **request.param) as (process, other):
                yield Two(stack, other, process)


async def test_another_router_cancels_it(two: Two) -> None:
    worker = two.stack.workers[0]
    response_id = await ask(two.other, ENDLESS)
    await until(lambda: worker.num_running == 1)
    answer = await two.stack.client.post(f"{RESPONSES}/{response_id}/cancel")
    assert answer.json()["status"] == "cancelled"
    await until(lambda: worker.num_running == 0)
    for client in (two.stack.client, two.other):
        assert (await seen(client, response_id))["status"] == "cancelled"


async def test_a_router_that_stops_lets_it_end(two: Two) -> None:
    response_id = await ask(two.other, ENDLESS | {"max_output_tokens": 40})
    two.process.send_signal(signal.SIGTERM)
    assert await two.process.wait() == 0
    answer = await seen(two.stack.client, response_id)
    assert (answer["status"], answer["usage"]["output_tokens"]) == ("incomplete", 40)


@pytest.mark.parametrize("two", [{"drain_timeout_s": 0.1}], indirect=True)
async def test_what_doesnt_end_in_time_has_failed_at_once(two: Two) -> None:
    response_id = await ask(two.other, ENDLESS)
    two.process.send_signal(signal.SIGTERM)
    assert await two.process.wait() == 0
    answer = await seen(two.stack.client, response_id)
    assert (answer["status"], answer["error"]["code"]) == ("failed", "server_error")
    assert two.stack.workers[0].num_running == 0


async def test_what_a_killed_router_ran_fails_with_its_lease(two: Two) -> None:
    response_id = await ask(two.other, ENDLESS)
    two.process.kill()
    await two.process.wait()
    lease = f"tandem:response_runner:{response_id}"
    async with redis.asyncio.Redis.from_url(two.stack.redis_url) as store:
        assert (await seen(two.stack.client, response_id))["status"] in ALIVE
        assert 0 < await store.pttl(lease) <= 15_000
        await store.pexpire(lease, 1)
        answer = await until_over(two.stack.client, response_id)
        assert (answer["status"], answer["error"]["code"]) == ("failed", "server_error")
        cancelled = await two.stack.client.post(f"{RESPONSES}/{response_id}/cancel")
        assert cancelled.json()["status"] == "failed"
