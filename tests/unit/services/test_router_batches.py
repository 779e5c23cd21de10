"""/v1/batches as OpenAI's client sees them, over workers without a model."""

import json
import time
from collections.abc import AsyncIterator
from typing import Any

import httpx
import openai
import pytest
import pytest_asyncio
import redis.asyncio
from batch_client import CHAT, COMPLETIONS, create, ended, line, results
from openai import AsyncOpenAI
from router_stack import MODEL, RouterStack, open_router_stack
from unreadable import NESTED_JSON

from services.router.batch.records import BatchRecord
from services.router.openai.bodies import CompletionBody
from services.runtime.redis_keys import RedisKeys

pytestmark = pytest.mark.asyncio(loop_scope="module")

KEY = "secret"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def stack(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[RouterStack]:
    path = tmp_path_factory.mktemp("router")
    async with open_router_stack(
        path, api_keys=(KEY,), batch_concurrency=4, batch_priority=7
    ) as stack:
        stack.client.headers["Authorization"] = f"Bearer {KEY}"
        await stack.add_worker()
        yield stack


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def client(stack: RouterStack) -> AsyncIterator[AsyncOpenAI]:
    async with AsyncOpenAI(base_url=f"{stack.url}/v1", api_key=KEY, max_retries=0) as client:
        yield client


async def test_a_batch_of_chats(client: AsyncOpenAI) -> None:
    batch = await create(client, [line(f"c{i}", CHAT, max_tokens=9) for i in range(20)], CHAT)
    assert batch.status == "validating"
    batch = await ended(client, batch)
    assert batch.status == "completed"
    assert (batch.model, batch.error_file_id, batch.errors) == (MODEL, None, None)
    assert batch.request_counts is not None
    assert batch.request_counts.to_dict() == {"total": 20, "completed": 20, "failed": 0}
    assert batch.usage is not None
    assert batch.usage.output_tokens == 180
    times = (batch.created_at, batch.in_progress_at, batch.finalizing_at, batch.completed_at)
    assert list(times) == sorted(t for t in times if t is not None)
    outputs = await results(client, batch.output_file_id)
    assert [output["custom_id"] for output in outputs] == [f"c{i}" for i in range(20)]
    for output in outputs:
        assert output["error"] is None
        assert output["response"]["status_code"] == 200
        body = output["response"]["body"]
        assert body["choices"][0]["message"]["content"] == "user\nhé"
        assert output["response"]["request_id"] == body["id"]
    file = await client.files.retrieve(batch.output_file_id or "")
    assert (file.purpose, file.filename) == ("batch_output", f"{batch.id}_output.jsonl")


@pytest.mark.parametrize("endpoint", ["/v1/responses", "/v1/embeddings"])
async def test_batches_of_what_else_is_served(client: AsyncOpenAI, endpoint: str) -> None:
    body = {"model": MODEL, "input": "abc"}
    if endpoint == "/v1/responses":
        body["max_output_tokens"] = 20  # type: ignore[assignment]
    lines = [{"custom_id": i, "method": "POST", "url": endpoint, "body": body} for i in "ab"]
    batch = await ended(client, await create(client, lines, endpoint))
    assert batch.status == "completed"
    assert batch.usage is not None
    assert batch.usage.input_tokens > 0
    outputs = await results(client, batch.output_file_id)
    assert [output["custom_id"] for output in outputs] == ["a", "b"]


async def test_requests_that_fail_go_to_the_error_file(client: AsyncOpenAI) -> None:
    lines = [line("good"), line("hot", temperature=-1), line("long", prompt="a" * 1000)]
    batch = await ended(client, await create(client, lines))
    assert batch.status == "completed"
    assert batch.request_counts is not None
    assert (batch.request_counts.completed, batch.request_counts.failed) == (1, 2)
    [good] = await results(client, batch.output_file_id)
    assert good["custom_id"] == "good"
    hot, long = await results(client, batch.error_file_id)
    assert hot["response"]["status_code"] == long["response"]["status_code"] == 400
    assert hot["response"]["body"]["error"]["param"] == "temperature"
    assert hot["response"]["request_id"]
    assert long["response"]["body"]["error"]["code"] == "context_length_exceeded"


async def test_bad_lines_are_all_named(client: AsyncOpenAI) -> None:
    lines = [
        line("a"),
        "{no json",
        "",
        line("a"),
        line("b", CHAT),
        line("c", model="gpt-9"),
        line("d", stream=True),
        line("h", background=True),
        {"custom_id": "e", "url": COMPLETIONS},
        {"custom_id": 1, "url": COMPLETIONS, "body": {}},
        {"custom_id": "f", "url": COMPLETIONS, "body": []},
        line("g") | {"method": "GET"},
        "[]",
    ]
    batch = await ended(client, await create(client, lines))
    assert batch.status == "failed"
    assert batch.failed_at is not None
    assert batch.errors is not None
    found = [(error.line, error.code, error.param) for error in batch.errors.data or ()]
    assert found == [
        (2, "invalid_json_line", None),
        (4, "duplicate_custom_id", "custom_id"),
        (5, "invalid_url", "url"),
        (6, "model_not_found", "body.model"),
        (7, "invalid_value", "body.stream"),
        (8, "invalid_value", "body.background"),
        (9, "missing_required_parameter", "body"),
        (10, "invalid_type", "custom_id"),
        (11, "invalid_type", "body"),
        (12, "invalid_value", "method"),
        (13, "invalid_type", None),
    ]


async def test_an_empty_file_is_no_batch(client: AsyncOpenAI) -> None:
    batch = await ended(client, await create(client, ["", " "]))
    assert batch.errors is not None
    assert [error.code for error in batch.errors.data or ()] == ["empty_file"]


async def test_lines_run_late_and_few_at_once(stack: RouterStack, client: AsyncOpenAI) -> None:
    lines = [line("a"), line("b", priority=9), line("c", priority=-1), line("d", priority="x")]
    batch = await ended(client, await create(client, lines))
    priorities = sorted(request.priority for request in stack.workers[0].requests[-3:])
    assert priorities == [7, 7, 9]
    [bad] = await results(client, batch.error_file_id)
    assert bad["response"]["body"]["error"]["param"] == "priority"


async def test_batches_are_listed(stack: RouterStack, client: AsyncOpenAI) -> None:
    made = [(await create(client, [line("a")])).id for _ in range(3)]
    page = await client.batches.list(limit=2)
    assert [batch.id for batch in page.data] == [made[2], made[1]]
    assert page.has_more
    page = await client.batches.list(limit=1, after=made[1])
    assert [batch.id for batch in page.data] == [made[0]]
    with pytest.raises(openai.BadRequestError) as bad:
        await client.batches.list(limit=101)
    assert bad.value.param == "limit"


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"endpoint": "/v1/images/generations"}, "endpoint"),
        ({"endpoint": None}, "endpoint"),
        ({"completion_window": "soon"}, "completion_window"),
        ({"completion_window": "31d"}, "completion_window"),
        ({"input_file_id": "file-1"}, "input_file_id"),
        ({"input_file_id": 7}, "input_file_id"),
        ({"metadata": {"k": "x" * 513}}, "metadata"),
        ({"metadata": {"k": 1}}, "metadata[...]"),
        ({"output_expires_after": {"seconds": 1}}, "output_expires_after.seconds"),
    ],
)
async def test_bad_fields_are_named(
    stack: RouterStack, client: AsyncOpenAI, changes: dict[str, Any], field: str
) -> None:
    file = await client.files.create(file=b"{}", purpose="batch")
    body = {"input_file_id": file.id, "endpoint": CHAT, "completion_window": "24h"}
    response = await stack.post("/v1/batches", body | changes)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == field


async def test_ids_that_are_not_there(client: AsyncOpenAI) -> None:
    for call in (client.batches.retrieve, client.batches.cancel):
        with pytest.raises(openai.NotFoundError) as missing:
            await call("batch_1")
        assert missing.value.code == "batch_not_found"


async def test_keys_are_asked_for(stack: RouterStack) -> None:
    async with httpx.AsyncClient(base_url=stack.url) as stranger:
        for path in ("/v1/files", "/v1/batches", "/v1/batches/batch_1"):
            assert (await stranger.get(path)).status_code == 401


async def test_a_batch_says_how_long_its_output_is_kept(client: AsyncOpenAI) -> None:
    file = await client.files.create(file=json.dumps(line("a")).encode(), purpose="batch")
    batch = await client.batches.create(
        input_file_id=file.id,
        endpoint=COMPLETIONS,
        completion_window="24h",
        metadata={"night": "1"},
        output_expires_after={"anchor": "created_at", "seconds": 7200},
    )
    batch = await ended(client, batch)
    assert batch.metadata == {"night": "1"}
    output = await client.files.retrieve(batch.output_file_id or "")
    assert output.expires_at == output.created_at + 7200


async def test_what_ended_can_not_be_cancelled(client: AsyncOpenAI) -> None:
    batch = await ended(client, await create(client, [line("a")]))
    with pytest.raises(openai.ConflictError) as conflict:
        await client.batches.cancel(batch.id)
    assert conflict.value.code == "batch_not_cancellable"


async def test_a_deleted_input_fails_the_batch(stack: RouterStack, client: AsyncOpenAI) -> None:
    now = int(time.time())
    record = BatchRecord(
        id="batch_gone",
        endpoint=COMPLETIONS,
        input_file_id="file-gone",
        completion_window="24h",
        created_at=now,
        expires_at=now + 100,
        output_ttl_s=100,
    )
    await stack.service.batches.store.create(record)
    batch = await ended(client, await client.batches.retrieve(record.id))
    assert batch.status == "failed"
    assert batch.errors is not None
    assert [error.param for error in batch.errors.data or ()] == ["input_file_id"]


async def test_a_fault_in_an_endpoint_fails_its_line_alone(
    stack: RouterStack, client: AsyncOpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(body: CompletionBody) -> None:
        if body.prompt == "bug":
            raise ZeroDivisionError

    monkeypatch.setattr("services.router.openai.api.refuse_unsupported", broken)
    batch = await ended(client, await create(client, [line("a"), line("b", prompt="bug")]))
    assert batch.status == "completed"
    [failed] = await results(client, batch.error_file_id)
    assert failed["response"]["status_code"] == 500
    assert len(await results(client, batch.output_file_id)) == 1


async def test_a_fault_in_a_batch_fails_it_alone(
    stack: RouterStack, client: AsyncOpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(line: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("services.router.batch.run.model_in", broken)
    batch = await ended(client, await create(client, [line("a")]))
    assert batch.status == "failed"
    assert batch.errors is not None
    assert [error.code for error in batch.errors.data or ()] == ["internal_error"]
    assert not stack.service.failed.is_set()


@pytest.mark.parametrize("value", [b"{", b'{"id": "\xff"}', NESTED_JSON])
async def test_records_that_cant_be_read_harm_no_others(
    stack: RouterStack, client: AsyncOpenAI, caplog: pytest.LogCaptureFixture, value: bytes
) -> None:
    keys = RedisKeys()
    async with redis.asyncio.Redis.from_url(stack.redis_url) as store:
        await store.set(keys.batch("batch_broken"), value)
        await store.zadd(keys.batches, {"batch_broken": 0, b"\xff": 0})
        await store.sadd(keys.open_batches, "batch_broken", b"\xff")
        batch = await ended(client, await create(client, [line("a")]))
        assert batch.status == "completed"
        assert "batch_broken" not in [each.id async for each in client.batches.list()]
        with pytest.raises(openai.InternalServerError) as unreadable:
            await client.batches.retrieve("batch_broken")
        assert unreadable.value.status_code == 503
        assert await store.sismember(keys.open_batches, "batch_broken")
        await store.delete(keys.batch("batch_broken"))
        await store.srem(keys.open_batches, "batch_broken", b"\xff")
    assert "batch batch_broken is left to others: " in caplog.text
    assert not stack.service.failed.is_set()
