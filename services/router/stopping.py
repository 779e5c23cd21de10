"""How a router ends: no new connections, time for what runs, and none of it at a second signal."""

import asyncio
from collections.abc import Coroutine
from typing import Any

import uvicorn


class Stopping:
    """`stop` is for each signal. The server itself waits for requests on connections."""

    def __init__(self, server: uvicorn.Server, *, drain_timeout_s: float) -> None:
        self._server = server
        self._drain_timeout_s = drain_timeout_s
        self._loop = asyncio.get_running_loop()
        self._end_s: float | None = None
        self._forced = asyncio.Event()

    def stop(self) -> None:
        if self._server.should_exit:
            self._server.force_exit = True
            self._forced.set()
        else:
            self._server.should_exit = True
            self._end_s = self._loop.time() + self._drain_timeout_s

    async def drain(self, idle: Coroutine[Any, Any, Any]) -> None:
        """Waits for `idle` in what the server has left of the time."""
        left_s = 0.0 if self._end_s is None else max(0.0, self._end_s - self._loop.time())
        waiting = [asyncio.create_task(idle), asyncio.create_task(self._forced.wait())]
        await asyncio.wait(waiting, timeout=left_s, return_when=asyncio.FIRST_COMPLETED)
        for task in waiting:
            task.cancel()
