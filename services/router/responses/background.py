"""Background responses: they run whether or not anybody waits, and are kept from their start.

1. The request is checked and enters the queue as any other. Errors up to here are the answer.
2. It's kept as queued, or as in progress if that is so already, and the client gets its id.
3. While it runs, its lease is renewed. Who cancels or deletes it, at any router, ends the lease;
   then what becomes of it here isn't kept.
4. Its end is written with the lease given back. A router that dies doesn't come to that: without a
   lease and an end the response has failed (`as_clients_see_it`).
"""

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
from fastapi import Response

from protocol.errors import TandemError
from services.router.dispatch.generation import Generation
from services.router.http.errors import HttpError
from services.router.responses.answers import ResponsesAnswers, failure
from services.router.responses.store import Kept, ResponseStore, StoredResponse
from services.runtime.tasks import TaskOwner

logger = logging.getLogger(__name__)

# The first is well below the lease's time, the second what an outage at its end may last.
RENEW_S = 3.0
LAST_TRIES = 10
RETRY_S = 1.0

_OPEN = ("queued", "in_progress")
_GONE = {"code": "server_error", "message": "The server that ran it is gone."}
_FAULT = {"code": "server_error", "message": "The server failed; its log says why."}


class BackgroundRuns:
    """Those of this router."""

    def __init__(
        self,
        store: ResponseStore,
        *,
        runner_id: str,
        on_failure: Callable[[BaseException], None],
        renew_s: float = RENEW_S,
    ) -> None:
        """`runner_id` must be this process's alone, in this life."""
        self._store = store
        self._runner_id = runner_id
        self._renew_s = renew_s
        self._tasks = TaskOwner(on_failure=on_failure)
        self._runs: set[BackgroundRun] = set()
        self._idle = asyncio.Event()
        self._idle.set()

    async def start(self, ask: Callable[["BackgroundRun"], Awaitable[Response]]) -> StoredResponse:
        """Runs what `ask` asks for; returns what is kept of it so far. Raises TandemError."""
        run = BackgroundRun(self._store, self._runner_id, self._renew_s)
        self._runs.add(run)
        self._idle.clear()
        self._tasks.start(self._run(run, ask))
        # The run sets it, whatever becomes of who waits here.
        return await asyncio.shield(run.opened)

    async def until_idle(self) -> None:
        await self._idle.wait()

    async def close(self) -> None:
        """What still runs has failed; others can see that at once."""
        await self._tasks.close()
        with contextlib.suppress(HttpError):
            await self._store.abandon([run.id for run in self._runs if run.id is not None])

    async def _run(
        self, run: "BackgroundRun", ask: Callable[["BackgroundRun"], Awaitable[Response]]
    ) -> None:
        await run.run(ask)
        # If it was cancelled instead, `close` has still to know of it.
        self._runs.discard(run)
        if not self._runs:
            self._idle.set()


class BackgroundRun:
    """One of them. A `Follower` of its request."""

    def __init__(self, store: ResponseStore, runner_id: str, renew_s: float) -> None:
        self.opened: asyncio.Future[StoredResponse] = asyncio.get_running_loop().create_future()
        self.id: str | None = None
        self.answers: ResponsesAnswers | None = None
        self._store = store
        self._runner_id = runner_id
        self._renew_s = renew_s
        self._record: StoredResponse | None = None
        self._end: StoredResponse | None = None
        self._has_started = False
        self._news = asyncio.Event()

    def entered(self, generation: Generation) -> None:
        assert self.answers is not None, "made before its generation"
        self.id = generation.request_id
        self._record = self.answers.unfinished(generation)
        self._news.set()

    def started(self) -> None:
        self._has_started = True
        self._news.set()

    async def keep(self, response_id: str, record: StoredResponse) -> bool:  # noqa: ARG002
        """For the answer. It's written at the end, until that succeeds."""
        self._end = record
        return True

    async def run(self, ask: Callable[["BackgroundRun"], Awaitable[Response]]) -> None:
        async with asyncio.TaskGroup() as tasks:
            asking = tasks.create_task(self._outcome(ask))
            asking.add_done_callback(lambda _: self._news.set())
            if not await self._open(asking):
                return
            assert self.id is not None
            assert self._record is not None
            while not asking.done():
                if not await self._still_runs():
                    asking.cancel()
                    return
            error = asking.result()
        end = self._end or self._record.with_answer(status="failed", error=error or _FAULT)
        await self._finish(self.id, end)

    async def _outcome(
        self, ask: Callable[["BackgroundRun"], Awaitable[Response]]
    ) -> dict[str, Any] | None:
        """The error that ended it, as the answer shows it."""
        try:
            await ask(self)
        except TandemError as error:
            if self._record is None:
                self.opened.set_exception(error)
            return failure(error)
        except Exception as error:
            # What the HTTP server does with a bug of ours: this request fails, the others go on.
            if self._record is None:
                self.opened.set_exception(error)
            else:
                logger.exception("background response %s failed", self.id)
            return _FAULT
        return None

    async def _open(self, asking: asyncio.Task[Any]) -> bool:
        """False if the client has its error instead."""
        await self._news.wait()
        self._news.clear()
        if self.opened.done():
            return False
        assert self.id is not None
        assert self._record is not None
        if self._has_started:
            self._record = self._record.with_answer(status="in_progress")
        try:
            if not await self._store.put(self.id, self._record, next_runner=self._runner_id):
                text = "There is no room to keep this response, so it can't run in the background."
                raise HttpError(503, text, code="store_unavailable")
        except HttpError as error:
            asking.cancel()
            self.opened.set_exception(error)
            return False
        self.opened.set_result(self._record)
        return True

    async def _still_runs(self) -> bool:
        """Waits for news, or for the time to renew the lease. False if that is lost."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._renew_s):
                await self._news.wait()
        self._news.clear()
        assert self.id is not None
        assert self._record is not None
        # Redis may be back before the lease is over.
        with contextlib.suppress(HttpError):
            if self._has_started and status_of(self._record) == "queued":
                record = self._record.with_answer(status="in_progress")
                runner = self._runner_id
                if not await self._store.put(self.id, record, runner=runner, next_runner=runner):
                    return False
                self._record = record
            return await self._store.renew(self.id, self._runner_id)
        return True

    async def _finish(self, response_id: str, record: StoredResponse) -> None:
        for _ in range(LAST_TRIES):
            try:
                await self._store.put(response_id, record, runner=self._runner_id)
            except HttpError:
                await asyncio.sleep(RETRY_S)
            else:
                return
        logger.error("background response %s is over, but Redis doesn't take it", response_id)


def status_of(record: StoredResponse) -> str:
    return msgspec.json.decode(record.answer, type=_Head).status


def is_background(record: StoredResponse) -> bool:
    return msgspec.json.decode(record.answer, type=_Head).background


def is_open(record: StoredResponse) -> bool:
    return status_of(record) in _OPEN


def as_clients_see_it(kept: Kept) -> StoredResponse:
    """What was left unfinished has failed."""
    if kept.runner is None and is_open(kept.record):
        return kept.record.with_answer(status="failed", error=_GONE)
    return kept.record


class _Head(msgspec.Struct):
    status: str
    background: bool
