"""What happens below the API: bytes that are no HTTP, heads without end, clients that leave."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import pytest_asyncio
from router_stack import MAX_MODEL_LEN, RouterStack, open_router_stack, until

from services.router.http import protocol as http_protocol
from services.router.noop_worker import NoopBehaviour

pytestmark = pytest.mark.asyncio(loop_scope="module")

COMPLETIONS = "/v1/completions"
Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def stack(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[RouterStack]:
    async with open_router_stack(tmp_path_factory.mktemp("router")) as stack:
        await stack.add_worker(behaviour=NoopBehaviour(step_s=0.002))
        yield stack


@asynccontextmanager
async def connected(stack: RouterStack) -> AsyncIterator[Connection]:
    reader, writer = await asyncio.open_connection(*stack.address)
    try:
        yield reader, writer
    finally:
        writer.close()


def post(fields: dict[str, Any]) -> bytes:
    content = json.dumps({"prompt": "abc"} | fields).encode()
    head = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(content)}\r\n\r\n"
    return head.encode() + content


async def answer_to(stack: RouterStack, data: bytes) -> tuple[int, dict[str, Any]]:
    """Status and error of the one answer, behind which the connection ends."""
    async with connected(stack) as (reader, writer):
        writer.write(data)
        answer = await reader.read()
    head, _, content = answer.partition(b"\r\n\r\n")
    assert b"content-type: application/json" in head
    assert b"connection: close" in head
    return int(head.split()[1]), json.loads(content)["error"]


@pytest.mark.parametrize(
    "data",
    [
        b"\x16\x03\x01\x02\x00\x01\x00",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"GET /v1/models HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
        b"GET /v1/m\xff HTTP/1.1\r\nHost: x\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nzzz\r\n",
    ],
    ids=["TLS", "HTTP/2", "length", "path", "chunk"],
)
async def test_what_is_no_http_is_refused_in_the_apis_words(
    stack: RouterStack, data: bytes
) -> None:
    status, error = await answer_to(stack, data)
    assert status == 400
    assert error["code"] == "invalid_http"


@pytest.mark.parametrize("end", [b"", b"\r\n\r\n"], ids=["without end", "whole"])
async def test_a_head_is_bounded(stack: RouterStack, end: bytes) -> None:
    long = b"GET /v1/models HTTP/1.1\r\nX: " + b"a" * http_protocol.MAX_HEAD_BYTES
    status, error = await answer_to(stack, long + end)
    assert status == 431
    assert error["code"] == "head_too_large"


async def test_a_body_before_it_does_not_make_a_head_long(stack: RouterStack) -> None:
    body = b'{"prompt": "a"' + b" " * 2 * http_protocol.MAX_HEAD_BYTES + b"}"
    first = f"POST /tokenize HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
    async with connected(stack) as (reader, writer):
        writer.write(first.encode() + body + b"GET /version HTTP/1.1\r\nHo")
        assert (await reader.readuntil(b"}")).startswith(b"HTTP/1.1 200")
        writer.write(b"st: x\r\nConnection: close\r\n\r\n")
        assert b"HTTP/1.1 200" in await reader.read()


async def test_a_head_that_nobody_ends_is_not_waited_for(
    stack: RouterStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_protocol, "HEAD_TIMEOUT_S", 0.05)
    for start in (b"", b"GET /v1/models HTTP/1.1\r\nX: "):
        async with connected(stack) as (reader, writer):
            writer.write(start)
            assert await reader.read() == b""
    async with connected(stack) as (reader, writer):
        writer.write(b"GET /version HTTP/1.1\r\nHost: x\r\n\r\nGET /vers")
        assert (await reader.read()).startswith(b"HTTP/1.1 200 ")


async def test_a_body_that_does_not_come_is_not_waited_for(
    stack: RouterStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_protocol, "SILENCE_S", 0.05)
    status, error = await answer_to(stack, post({})[:-3])
    assert status == 408
    assert error["code"] == "request_timeout"


async def test_an_answer_outlives_the_wait_for_the_next_request(
    stack: RouterStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_protocol, "HEAD_TIMEOUT_S", 0.01)
    monkeypatch.setattr(http_protocol, "SILENCE_S", 0.01)
    for start in (b"GET /vers", post({})[:-3]):
        async with connected(stack) as (reader, writer):
            writer.write(post({"stream": True, "max_tokens": 60}) + start)
            answer = await reader.readuntil(b"\r\n0\r\n\r\n")
        assert answer.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")


async def test_what_follows_a_request_does_not_garble_its_answer(stack: RouterStack) -> None:
    async with connected(stack) as (reader, writer):
        writer.write(post({"stream": True, "max_tokens": 30}) + b"}")
        answer = await reader.read()
    assert answer.count(b"HTTP/1.1") == 1
    assert answer.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")


async def test_of_requests_in_one_go_each_is_ended_when_the_client_leaves(
    stack: RouterStack,
) -> None:
    """The first is under way; the connection has moved on to reading the second."""
    long = post({"max_tokens": MAX_MODEL_LEN - 3})
    async with connected(stack) as (_, writer):
        writer.write(long + long)
        await until(lambda: stack.num_delivered > 0)
        # What is under way now must not have come to its own end when we look.
        [flight] = stack.service.dispatcher.flights
    await until(lambda: stack.service.dispatcher.num_flights == 0)
    assert len(flight.tokens) < MAX_MODEL_LEN - 3


async def test_behind_a_long_body_it_is_noticed_too_that_the_client_leaves(
    stack: RouterStack,
) -> None:
    async with connected(stack) as (_, writer):
        writer.write(post({"max_tokens": MAX_MODEL_LEN - 3, "user": "a" * 500_000}))
        await until(lambda: stack.num_delivered > 0)
        [flight] = stack.service.dispatcher.flights
    await until(lambda: stack.service.dispatcher.num_flights == 0)
    assert len(flight.tokens) < MAX_MODEL_LEN - 3
