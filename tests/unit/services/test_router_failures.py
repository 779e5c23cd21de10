"""Clients that leave, readers that dawdle, workers that die: nobody hangs, nothing leaks."""

import asyncio
import json
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from router_stack import RouterStack, open_router_stack, parse_events, until

from protocol.records import WorkerLoad
from services.router.noop_worker import NoopBehaviour, NoopWorker

COMPLETIONS = "/v1/completions"
STALLED = NoopBehaviour(stall_at=0)


@pytest.fixture
async def stack(tmp_path: Path) -> AsyncIterator[RouterStack]:
    async with open_router_stack(tmp_path) as stack:
        yield stack


def text_of(events: list[dict[str, Any]]) -> str:
    return "".join(event["choices"][0]["text"] for event in events)


async def started(worker: NoopWorker) -> None:
    await until(lambda: bool(worker.requests))


async def assert_aborted(*workers: NoopWorker) -> None:
    """Within a second, on each worker."""
    async with asyncio.timeout(1.0):
        for worker in workers:
            await worker.aborted.get()
        # Each of n outputs is aborted by a message of its own.
        await until(lambda: all(worker.num_running == 0 for worker in workers))


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_leaves_before_the_first_token(
    stack: RouterStack, *, stream: bool
) -> None:
    prefill = await stack.add_worker("prefill", STALLED)
    decode = await stack.add_worker("decode", STALLED)
    body = {"prompt": "abc", "stream": stream}
    asking = asyncio.create_task(stack.post(COMPLETIONS, body))
    await started(decode)
    asking.cancel()
    await assert_aborted(prefill, decode)
    assert stack.service.dispatcher.num_flights == 0


async def test_a_client_that_leaves_amid_its_stream(stack: RouterStack) -> None:
    decode = await stack.add_worker(behaviour=NoopBehaviour(stall_at=3))
    body = {"prompt": "abc", "stream": True, "n": 2, "max_tokens": 50}
    async with stack.client.stream("POST", COMPLETIONS, json=body) as response:
        async for line in response.aiter_lines():
            if line:
                break
        await until(lambda: len(decode.requests) == 2)
    await assert_aborted(decode)
    await until(lambda: stack.service.dispatcher.num_flights == 0)


async def test_a_client_that_leaves_while_it_uploads(stack: RouterStack) -> None:
    reader, writer = await asyncio.open_connection(*stack.address)
    writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
    await writer.drain()
    writer.close()
    await reader.read()
    assert (await stack.client.get("/version")).status_code == 200


async def test_a_slow_reader_gets_everything_in_fewer_events(stack: RouterStack) -> None:
    decode = await stack.add_worker()
    num_tokens = 400
    body = {"prompt": "é" * 50, "max_tokens": num_tokens, "stream": True, "n": 128}
    content = json.dumps(body).encode()
    reader, writer = await asyncio.open_connection(*stack.address, limit=1024)
    writer.write(
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
        b"Content-Length: %d\r\n\r\n" % len(content) + content
    )
    # Nothing is read until the worker has made all tokens.
    await until(lambda: len(decode.requests) == 128 and decode.num_running == 0)
    raw = await reader.read(-1)
    writer.close()
    events = parse_events(_dechunked(raw))
    for index in range(128):
        parts = [c["text"] for e in events for c in e["choices"] if c["index"] == index]
        assert "".join(parts) == "é" * (num_tokens // 2)
    assert len(events) < 128 * num_tokens / 2


def _dechunked(raw: bytes) -> bytes:
    """The body of an HTTP response in chunks."""
    rest = raw.partition(b"\r\n\r\n")[2]
    body = b""
    while rest:
        size, _, rest = rest.partition(b"\r\n")
        length = int(size, 16)
        body += rest[:length]
        rest = rest[length + 2 :]
    return body


@pytest.mark.parametrize("stream", [False, True])
async def test_a_killed_worker_is_replaced_amid_an_answer(
    stack: RouterStack, *, stream: bool
) -> None:
    first = await stack.spawn_worker("a", step_s=0.02)
    body = {"prompt": "0123456789", "max_tokens": 60, "stream": stream}
    asking = asyncio.create_task(stack.post(COMPLETIONS, body))
    await until(lambda: stack.num_delivered > 5)
    second = await stack.add_worker()
    first.kill()
    response = await asking
    if stream:
        text = text_of(parse_events(response.content))
    else:
        text = response.json()["choices"][0]["text"]
    assert text == "0123456789" * 6
    [again] = second.requests
    assert again.key.attempt == 2
    assert again.num_prompt_tokens == 10
    assert len(again.token_ids) > 15


async def test_without_another_worker_a_killed_one_ends_the_answer_soon(
    stack: RouterStack,
) -> None:
    worker = await stack.spawn_worker("a", step_s=0.02)
    body = {"prompt": "abc", "max_tokens": 400}
    asking = [
        asyncio.create_task(stack.post(COMPLETIONS, body | {"stream": stream}))
        for stream in (False, True)
    ]
    await until(lambda: stack.num_delivered > 5)
    worker.kill()
    killed_s = time.monotonic()
    whole, streamed = await asyncio.gather(*asking)
    assert time.monotonic() - killed_s < 5.0
    assert whole.status_code == 503
    assert whole.json()["error"]["code"] == "worker_lost"
    # The stream had begun, so its error is an event.
    assert streamed.status_code == 200
    *_, last = parse_events(streamed.content)
    assert last["error"]["code"] == "worker_lost"
    assert (await stack.client.get("/health")).status_code == 503


async def test_a_decode_worker_killed_before_its_first_word(stack: RouterStack) -> None:
    await stack.add_worker("prefill")
    silent = await stack.spawn_worker("silent", "decode", stall_at=0)
    asking = asyncio.create_task(stack.post(COMPLETIONS, {"prompt": "abc", "max_tokens": 6}))
    await until(lambda: stack.num_delivered == 1)
    await stack.add_worker("decode")
    silent.kill()
    assert (await asking).json()["choices"][0]["text"] == "abcabc"


async def test_a_prefill_worker_killed_before_its_first_token(stack: RouterStack) -> None:
    silent = await stack.spawn_worker("silent", "prefill", stall_at=0)
    decode = await stack.add_worker("decode")
    asking = asyncio.create_task(stack.post(COMPLETIONS, {"prompt": "abc", "max_tokens": 6}))
    await started(decode)
    silent.kill()
    # The decode worker that is left prefills for itself.
    assert (await asking).json()["choices"][0]["text"] == "abcabc"
    assert await decode.aborted.get() == decode.requests[0].key


async def test_without_workers_the_answer_is_503(stack: RouterStack) -> None:
    response = await stack.post(COMPLETIONS, {"prompt": "abc", "stream": True})
    assert response.status_code == 503
    assert response.json()["error"]["code"] == "no_worker"
    assert (await stack.client.get("/health")).status_code == 503


async def test_a_request_that_no_worker_takes(stack: RouterStack) -> None:
    await stack.add_worker(behaviour=NoopBehaviour(refuses=True, refusal_is_retryable=False))
    response = await stack.post(COMPLETIONS, {"prompt": "abc", "stream": True})
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "request_refused"


async def test_a_draining_worker_gets_nothing_new(stack: RouterStack) -> None:
    first = await stack.add_worker()
    second = await stack.add_worker()
    first.report_load(WorkerLoad(draining=True))
    await until(
        lambda: any(entry["load"]["draining"] for entry in stack.service.cluster.describe())
    )
    for _ in range(4):
        assert (await stack.post(COMPLETIONS, {"prompt": "abc"})).status_code == 200
    assert (len(first.requests), len(second.requests)) == (0, 4)


async def test_a_request_that_takes_too_long(tmp_path: Path) -> None:
    async with open_router_stack(tmp_path, request_timeout_s=0.2) as stack:
        decode = await stack.add_worker(behaviour=NoopBehaviour(stall_at=2))
        response = await stack.post(COMPLETIONS, {"prompt": "abc"})
        assert response.status_code == 504
        *_, last = parse_events(
            (await stack.post(COMPLETIONS, {"prompt": "abc", "stream": True})).content
        )
        assert last["error"]["code"] == "timeout"
        await assert_aborted(decode, decode)


async def test_serving_goes_on_without_redis(stack: RouterStack) -> None:
    await stack.add_worker()
    stack.kill_redis()
    for _ in range(3):
        response = await stack.post(COMPLETIONS, {"prompt": "abc"})
        assert response.status_code == 200
    assert (await stack.client.get("/health")).status_code == 200


async def test_a_restarted_worker_is_found_again(stack: RouterStack) -> None:
    first = await stack.spawn_worker("a")
    first.kill()
    await until(lambda: not stack.service.cluster.describe())
    await stack.spawn_worker("a")
    response = await stack.post(COMPLETIONS, {"prompt": "abc", "max_tokens": 3})
    assert response.json()["choices"][0]["text"] == "abc"
