"""Batches that are stopped, run out of time or wait, over workers without a model."""

import json
import time
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio
from batch_client import COMPLETIONS, create, ended, line, results, until_completed
from openai import AsyncOpenAI
from router_stack import RouterStack, open_router_stack, until

from services.router.batch.records import BatchRecord
from services.router.noop_worker import NoopBehaviour

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(loop_scope="module")
async def stalling(
    tmp_path_factory: pytest.TempPathFactory,
) -> AsyncIterator[tuple[RouterStack, AsyncOpenAI]]:
    """One worker, which answers short requests and never ends others."""
    path = tmp_path_factory.mktemp("router")
    async with (
        open_router_stack(path) as stack,
        AsyncOpenAI(base_url=f"{stack.url}/v1", api_key="x", max_retries=0) as client,
    ):
        await stack.add_worker(behaviour=NoopBehaviour(stall_at=4))
        yield stack, client


async def test_a_cancelled_batch_keeps_what_is_done(
    stalling: tuple[RouterStack, AsyncOpenAI],
) -> None:
    stack, client = stalling
    batch = await create(client, [line("a", max_tokens=3), line("b"), line("c", max_tokens=2)])
    await until_completed(client, batch, 2)
    batch = await client.batches.cancel(batch.id)
    assert batch.status == "cancelling"
    assert batch.cancelling_at is not None
    batch = await ended(client, batch)
    assert batch.status == "cancelled"
    done = [each["custom_id"] for each in await results(client, batch.output_file_id)]
    assert done == ["a", "c"]
    [left] = await results(client, batch.error_file_id)
    assert (left["custom_id"], left["response"]) == ("b", None)
    assert left["error"]["code"] == "batch_cancelled"
    await until(lambda: stack.workers[0].num_running == 0)


async def test_time_runs_out(stalling: tuple[RouterStack, AsyncOpenAI]) -> None:
    stack, client = stalling
    lines = [json.dumps(each) for each in (line("a", max_tokens=3), line("b"))]
    file = await client.files.create(file="\n".join(lines).encode(), purpose="batch")
    now = int(time.time())
    record = BatchRecord(
        id="batch_short",
        endpoint=COMPLETIONS,
        input_file_id=file.id,
        completion_window="24h",
        created_at=now,
        expires_at=now + 2,
        output_ttl_s=100,
    )
    await stack.service.batches.store.create(record)
    stack.service.batches.wake()
    batch = await ended(client, await client.batches.retrieve(record.id))
    assert batch.status == "expired"
    [done] = await results(client, batch.output_file_id)
    [left] = await results(client, batch.error_file_id)
    assert (done["custom_id"], left["error"]["code"]) == ("a", "batch_expired")


async def test_it_waits_for_workers(tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("router")
    async with (
        open_router_stack(path) as stack,
        AsyncOpenAI(base_url=f"{stack.url}/v1", api_key="x", max_retries=0) as client,
    ):
        batch = await create(client, [line(str(i)) for i in range(3)])
        dispatcher = stack.service.dispatcher
        await until(lambda: dispatcher.num_flights == 3)
        await until(lambda: dispatcher.num_flights == 0)  # all were told that there is no worker
        await stack.add_worker()
        batch = await ended(client, batch)
        assert batch.request_counts is not None
        assert batch.request_counts.completed == 3


async def test_an_aborted_line_is_an_error(stalling: tuple[RouterStack, AsyncOpenAI]) -> None:
    stack, client = stalling
    batch = await create(client, [line("a", max_tokens=3), line("b")])
    await until_completed(client, batch, 1)
    aborted = await stack.post("/abort", {"abort_all": True})
    assert aborted.json()["num_aborted"] == 1
    batch = await ended(client, batch)
    assert batch.status == "completed"
    [left] = await results(client, batch.error_file_id)
    assert (left["custom_id"], left["error"]["code"]) == ("b", "request_aborted")
