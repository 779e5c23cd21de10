"""Sends a workload: a fixed number of requests at once, or each at its time."""

import asyncio
import time
from collections.abc import Callable, Sequence

from loadtest.client import LoadClient
from loadtest.results import RequestResult
from loadtest.workload import PlannedRequest


async def run_load(
    client: LoadClient,
    requests: Sequence[PlannedRequest],
    *,
    max_concurrency: int | None,
    on_result: Callable[[RequestResult], None],
) -> tuple[list[RequestResult], float]:
    """Results in the order of `requests`, and the seconds from first request to last answer.

    A request whose time has come while `max_concurrency` others run is sent late, and its
    `late_s` says by how much.
    """
    places = asyncio.Semaphore(max_concurrency or max(1, len(requests)))
    start_s = time.perf_counter()

    async def send(index: int, request: PlannedRequest, due_s: float) -> RequestResult:
        try:
            result = await client.send(request, index=index, start_s=start_s, due_s=due_s)
        finally:
            places.release()
        on_result(result)
        return result

    async with asyncio.TaskGroup() as group:
        tasks: list[asyncio.Task[RequestResult]] = []
        for index, request in enumerate(requests):
            due_s = start_s
            if request.offset_s is not None:
                due_s = start_s + request.offset_s
                await asyncio.sleep(max(0.0, due_s - time.perf_counter()))
            await places.acquire()
            if request.offset_s is None:
                due_s = time.perf_counter()
            tasks.append(group.create_task(send(index, request, due_s)))
    return [task.result() for task in tasks], time.perf_counter() - start_s
