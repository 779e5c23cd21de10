"""An owner for background tasks: none is lost, none fails in silence, none outlives its owner."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any


class TaskOwner:
    """Starts tasks and keeps them until they end.

    A task that raises is a bug or a fault nobody foresaw: `on_failure` gets the exception.
    """

    def __init__(self, *, on_failure: Callable[[BaseException], None]) -> None:
        self._on_failure = on_failure
        self._tasks: set[asyncio.Task[Any]] = set()

    def start(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._end)
        return task

    async def close(self) -> None:
        """Cancels all tasks and waits for their ends."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _end(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._on_failure(error)
