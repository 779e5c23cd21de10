"""Finds batches that nobody runs, and runs them."""

import asyncio
import contextlib
import logging
from typing import cast

from redis.exceptions import RedisError

from protocol.errors import UnreadableError
from services.router.batch.run import BatchRun, RunContext
from services.router.batch.store import LeaseLostError

logger = logging.getLogger(__name__)

# More of them at once would only compete for the same slots.
MAX_RUNNING = 8


class BatchRunner:
    """A router's part in running the stack's batches."""

    def __init__(self, context: RunContext, *, scan_s: float = 1.0) -> None:
        self._context = context
        self._store = context.store
        self._scan_s = scan_s
        self._running: dict[str, asyncio.Task[None]] = {}
        self._wake = asyncio.Event()

    def wake(self) -> None:
        """There is a new batch."""
        self._wake.set()

    async def run(self) -> None:
        """Until cancelled; then others take the batches over at once."""
        async with asyncio.TaskGroup() as tasks:
            while True:
                self._wake.clear()
                try:
                    for batch_id in await self._store.open_ids():
                        await self._try_start(batch_id, tasks)
                except (RedisError, OSError):
                    pass  # the directory, which uses the same Redis, says it in the log
                try:
                    async with asyncio.timeout(self._scan_s):
                        await self._wake.wait()
                except TimeoutError:
                    pass

    async def _try_start(self, batch_id: str, tasks: asyncio.TaskGroup) -> None:
        if batch_id in self._running or len(self._running) >= MAX_RUNNING:
            return
        if not await self._store.try_lease(batch_id, ttl_s=self._context.lease.ttl_s):
            return
        task = tasks.create_task(self._run(batch_id))
        self._running[batch_id] = task
        task.add_done_callback(lambda _: self._running.pop(batch_id))

    async def _run(self, batch_id: str) -> None:
        run: BatchRun | None = None
        try:
            # Read under the lease: before, somebody else may just have finished it.
            try:
                record = await self._store.get(batch_id)
            except UnreadableError as error:
                # A router of the release that wrote it takes it.
                logger.warning("batch %s is left to others: %s", batch_id, error)
                return
            if record is None or record.is_over:
                await self._store.forget(batch_id)
            else:
                run = BatchRun(self._context, record)
                await run.run()
        except* (LeaseLostError, RedisError, OSError) as errors:
            logger.warning("batch %s is left for now: %s", batch_id, _first(errors))
        except* Exception:
            # A batch that brings out a fault of ours fails, as a request would: were it to end
            # the router, it would end each one that took it over.
            logger.exception("batch %s failed", batch_id)
            await self._give_up(run)
        finally:
            await self._release(batch_id)

    async def _give_up(self, run: BatchRun | None) -> None:
        try:
            if run is not None:
                await run.give_up()
        except (LeaseLostError, RedisError, OSError) as error:
            logger.warning("its failure isn't recorded: %s", error)

    async def _release(self, batch_id: str) -> None:
        # Without that it ends by itself.
        with contextlib.suppress(RedisError, OSError):
            await self._store.release_lease(batch_id)


def _first(error: BaseException) -> BaseException:
    """The error inside of groups."""
    if isinstance(error, BaseExceptionGroup):
        group = cast("BaseExceptionGroup[BaseException]", error)
        return _first(group.exceptions[0])
    return error
