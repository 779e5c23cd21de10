"""What /v1/responses keeps in Redis, for how long, and what happens without."""

from pathlib import Path
from typing import Any

import httpx
import pytest
import redis.asyncio
from router_stack import RouterStack, open_router_stack
from unreadable import NESTED_JSON

from services.runtime.redis_keys import RedisKeys

RESPONSES = "/v1/responses"


async def ask(stack: RouterStack, body: dict[str, Any]) -> dict[str, Any]:
    response = await stack.post(RESPONSES, body)
    assert response.status_code == 200, response.text
    return response.json()


async def test_answers_go_on_without_redis_but_are_not_kept(tmp_path: Path) -> None:
    async with open_router_stack(tmp_path) as stack:
        await stack.add_worker()
        stack.kill_redis()
        await stack.redis.wait()
        answer = await ask(stack, {"input": "x", "max_output_tokens": 2})
        assert answer["store"] is False
        away = [
            await stack.post(RESPONSES, {"input": "x", "previous_response_id": answer["id"]}),
            await stack.client.get(f"{RESPONSES}/{answer['id']}"),
            await stack.client.delete(f"{RESPONSES}/{answer['id']}"),
        ]
        assert [_status_and_code(response) for response in away] == [(503, "store_unavailable")] * 3


def _status_and_code(response: httpx.Response) -> tuple[int, str]:
    return response.status_code, response.json()["error"]["code"]


async def test_with_no_time_to_live_nothing_is_kept(tmp_path: Path) -> None:
    async with open_router_stack(tmp_path, response_ttl_s=0) as stack:
        await stack.add_worker()
        answer = await ask(stack, {"input": "x", "max_output_tokens": 2})
        assert answer["store"] is False
        assert (await stack.client.get(f"{RESPONSES}/{answer['id']}")).status_code == 404


async def test_the_oldest_answers_make_room(tmp_path: Path) -> None:
    async with open_router_stack(tmp_path, response_store_bytes=6000) as stack:
        await stack.add_worker()
        body = {"input": "x", "max_output_tokens": 2}
        answers = [await ask(stack, body) for _ in range(12)]
        assert all(answer["store"] for answer in answers)
        found = [await stack.client.get(f"{RESPONSES}/{answer['id']}") for answer in answers]
        statuses = [response.status_code for response in found]
        num_kept = statuses.count(200)
        assert 1 < num_kept < 12
        assert statuses == [404] * (12 - num_kept) + [200] * num_kept
        too_large = await ask(stack, body | {"metadata": {"a": "x" * 6000}})
        assert too_large["store"] is False
        newest = await stack.client.get(f"{RESPONSES}/{answers[-1]['id']}")
        assert newest.status_code == 200, "nothing makes room for what has none"


async def test_what_isnt_to_be_stored_isnt(tmp_path: Path) -> None:
    async with open_router_stack(tmp_path) as stack:
        await stack.add_worker()
        answer = await ask(stack, {"input": "x", "max_output_tokens": 2, "store": False})
        assert (await stack.client.get(f"{RESPONSES}/{answer['id']}")).status_code == 404


@pytest.mark.parametrize(
    "value", [b"{", b'{"answer": {}, "input": [{"type": "\xff"}]}', NESTED_JSON]
)
async def test_what_cant_be_read_isnt_kept(tmp_path: Path, value: bytes) -> None:
    async with open_router_stack(tmp_path) as stack:
        async with redis.asyncio.Redis.from_url(stack.redis_url) as client:
            await client.set(RedisKeys().response("resp_1"), value)
        assert (await stack.client.get(f"{RESPONSES}/resp_1")).status_code == 404
