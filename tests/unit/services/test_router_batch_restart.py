"""A batch outlives the router that runs it, and does nothing twice that anybody sees."""

import asyncio
import json
import signal
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from router_process import router_process
from router_stack import DEADLINE_S, RouterStack, open_router_stack, until

from services.router.noop_worker import NoopBehaviour

NUM_LINES = 60
NUM_AT_ONCE = 4


@dataclass(slots=True)
class RunningBatch:
    stack: RouterStack
    process: asyncio.subprocess.Process
    batch_id: str
    salt: str

    @property
    def num_sent(self) -> int:
        """Requests of this batch that the worker got."""
        requests = self.stack.workers[0].requests
        return sum(request.cache_salt == self.salt for request in requests)

    async def status(self) -> dict[str, Any]:
        """What the router in this process says."""
        return (await self.stack.client.get(f"/v1/batches/{self.batch_id}")).json()

    async def until_completed(self, count: int) -> None:
        async with asyncio.timeout(DEADLINE_S):
            while (await self.status())["request_counts"]["completed"] < count:  # noqa: ASYNC110
                await asyncio.sleep(0.02)

    async def output(self) -> list[dict[str, Any]]:
        async with asyncio.timeout(2 * DEADLINE_S):
            while (status := await self.status())["status"] != "completed":  # noqa: ASYNC110
                await asyncio.sleep(0.05)
        assert status["request_counts"] == {"total": NUM_LINES, "completed": NUM_LINES, "failed": 0}
        path = f"/v1/files/{status['output_file_id']}/content"
        content = (await self.stack.client.get(path)).content
        return [json.loads(each) for each in content.splitlines()]


async def post_batch(client: httpx.AsyncClient, *, salt: str) -> str:
    body = {"prompt": "abc", "max_tokens": 10, "cache_salt": salt}
    lines = [
        {"custom_id": f"line {i}", "method": "POST", "url": "/v1/completions", "body": body}
        for i in range(NUM_LINES)
    ]
    content = "\n".join(json.dumps(each) for each in lines).encode()
    file = await client.post("/v1/files", data={"purpose": "batch"}, files={"file": content})
    batch = await client.post(
        "/v1/batches",
        json={
            "input_file_id": file.json()["id"],
            "endpoint": "/v1/completions",
            "completion_window": "1h",
        },
    )
    assert batch.status_code == 200, batch.text
    return batch.json()["id"]


@asynccontextmanager
async def running_batch(path: Path) -> AsyncIterator[RunningBatch]:
    """A batch that a router in another process runs."""
    async with open_router_stack(path, batch_concurrency=NUM_AT_ONCE) as stack:
        await stack.add_worker(behaviour=NoopBehaviour(step_s=0.02))
        with socket.create_server(("127.0.0.1", 0)) as listener:
            async with router_process(stack, path, listener, batch_concurrency=NUM_AT_ONCE) as (
                process,
                client,
            ):
                for salt in "abcdefgh":
                    batch_id = await post_batch(client, salt=salt)
                    if f"-{process.pid}-" in await lease_of(stack, batch_id):
                        yield RunningBatch(stack, process, batch_id, salt)
                        return
                    # Rarely it's our own router that comes first.
                raise AssertionError("the other router never runs a batch")


async def lease_of(stack: RouterStack, batch_id: str) -> str:
    async with asyncio.timeout(DEADLINE_S):
        while True:
            lease = await stack.service._redis.get(f"tandem:batch:{batch_id}:lease")
            if lease is not None:
                return lease.decode()
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
async def test_another_router_takes_over(tmp_path: Path, number: signal.Signals) -> None:
    async with running_batch(tmp_path) as running:
        await running.until_completed(8)
        running.process.send_signal(number)
        await running.process.wait()
        output = await running.output()
        assert [each["custom_id"] for each in output] == [f"line {i}" for i in range(NUM_LINES)]
        assert all(each["response"]["status_code"] == 200 for each in output)
        assert NUM_LINES <= running.num_sent <= NUM_LINES + NUM_AT_ONCE


async def test_a_stalled_router_does_no_harm(tmp_path: Path) -> None:
    async with running_batch(tmp_path) as running:
        await running.until_completed(8)
        running.process.send_signal(signal.SIGSTOP)
        output = await running.output()
        running.process.send_signal(signal.SIGCONT)
        assert len(output) == NUM_LINES
        ended = await running.status()
        # It finds its lease gone, and the batch as it was left.
        running.process.send_signal(signal.SIGTERM)
        assert await running.process.wait() == 0
        assert await running.status() == ended


async def test_an_outage_of_redis_ends_no_router(tmp_path: Path) -> None:
    async with open_router_stack(tmp_path, batch_concurrency=NUM_AT_ONCE) as stack:
        worker = await stack.add_worker(behaviour=NoopBehaviour(step_s=0.05))
        await post_batch(stack.client, salt="a")
        await until(lambda: worker.num_running == NUM_AT_ONCE)
        stack.kill_redis()
        await until(lambda: worker.num_running == 0)
        answer = await stack.post("/v1/completions", {"prompt": "abc", "max_tokens": 3})
        assert answer.status_code == 200
        assert not stack.service.failed.is_set()
