"""One batch on its way, run by the router that holds its lease.

1. VALIDATING: every line is read; bad ones are named, and fail the batch.
2. IN_PROGRESS: lines without a result are sent through the API's own endpoints, so many at once;
   each result is kept in Redis as soon as it's there.
3. FINALIZING: the results become files, and the batch is COMPLETED.

A router that takes over starts where the record says, and does no line again that has a result.
Cancelled or out of time, the rest gets errors for results, and 3 follows all the same.
"""

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass

from protocol.errors import InvalidRequestError, ModelNotFoundError
from services.router.batch.answer import patient_answer
from services.router.batch.files import FileGoneError, FileRecord, FileStore, FileWriter
from services.router.batch.files_api import OUTPUT_PURPOSE
from services.router.batch.in_process import InProcessApi
from services.router.batch.lines import (
    LineValidator,
    RequestLine,
    ResultLine,
    answered,
    line_error,
    model_in,
    parse_line,
    tokens_used,
    unanswered,
    with_priority,
)
from services.router.batch.records import BatchError, BatchRecord, BatchStatus
from services.router.batch.store import BatchStore, LeaseLostError, Result
from services.router.served_model import ServedModel

logger = logging.getLogger(__name__)

MAX_REQUESTS = 50_000
_MAX_ERRORS = 100
_ENDINGS = {
    BatchStatus.CANCELLED: ("batch_cancelled", "The batch was cancelled before this request ran."),
    BatchStatus.EXPIRED: ("batch_expired", "The batch's time was over before this request ran."),
}


@dataclass(frozen=True, slots=True)
class LeaseTimings:
    """A router that dies is succeeded `ttl_s` later."""

    ttl_s: float = 5.0
    renew_s: float = 1.0


@dataclass(frozen=True, slots=True)
class RunContext:
    """What all batches of a router run with; `slots` bounds their lines under way together."""

    store: BatchStore
    files: FileStore
    api: InProcessApi
    model: ServedModel
    slots: asyncio.Semaphore
    priority: int
    lease: LeaseTimings


class BatchRun:
    """Await `run`, holding the batch's lease."""

    def __init__(self, context: RunContext, record: BatchRecord) -> None:
        self._context = context
        self._store = context.store
        self._record = record
        self._time_left: asyncio.Timeout | None = None
        self._is_cancelled = False

    async def run(self) -> None:
        """Raises ExceptionGroups of LeaseLostError, RedisError and OSError: the batch is left to
        whoever takes the lease next."""
        async with asyncio.TaskGroup() as tasks:
            watching = tasks.create_task(self._watch())
            try:
                await self._advance()
            except* FileGoneError:
                text = f"The input file `{self._record.input_file_id}` is gone."
                await self._fail([BatchError("file_not_found", text, "input_file_id")])
            watching.cancel()
        logger.info("batch %s is %s", self._record.id, self._record.status)

    async def give_up(self) -> None:
        """After a fault of ours. Raises LeaseLostError, RedisError and OSError."""
        if not self._record.is_over:
            await self._fail([BatchError("internal_error", "The server failed; its log says why.")])

    async def _watch(self) -> None:
        """Renews the lease, and sees whether the batch is to be cancelled."""
        while True:
            await self._store.renew_lease(self._record.id, ttl_s=self._context.lease.ttl_s)
            progress = await self._store.progress(self._record.id)
            if progress.cancelling_at is not None and self._time_left is not None:
                self._is_cancelled = True
                if not self._time_left.expired():
                    self._time_left.reschedule(asyncio.get_running_loop().time())
            await asyncio.sleep(self._context.lease.renew_s)

    async def _advance(self) -> None:
        if self._record.status is not BatchStatus.FINALIZING and not await self._work_in_time():
            await self._end_early()
        elif self._record.status is BatchStatus.FINALIZING:
            await self._finish(BatchStatus.COMPLETED)

    async def _work_in_time(self) -> bool:
        """False if time was over, or the batch was cancelled, before all was done."""
        time_left = self._time_left = asyncio.timeout(self._record.expires_at - time.time())
        try:
            async with time_left:
                if self._record.status is BatchStatus.VALIDATING:
                    await self._validate()
                if self._record.status is BatchStatus.IN_PROGRESS:
                    await self._run_lines()
                    await self._save(self._record.advanced(BatchStatus.FINALIZING, now=time.time()))
        except TimeoutError:
            if not time_left.expired():
                raise
        finally:
            self._time_left = None
        return not time_left.expired()

    async def _validate(self) -> None:
        context, record = self._context, self._record
        validator = LineValidator((record.endpoint,), context.model.check_name)
        errors: list[BatchError] = []
        number, model = 0, None
        async for number, line in context.files.lines(await self._input()):
            try:
                parsed = validator.check(line)
                model = model or model_in(parsed)
            except (InvalidRequestError, ModelNotFoundError) as error:
                errors.append(line_error(number, error))
            if len(errors) >= _MAX_ERRORS:
                break
            if validator.num_lines > MAX_REQUESTS:
                errors.append(
                    BatchError("too_many_requests", f"A batch has at most {MAX_REQUESTS} requests.")
                )
                break
        if number == 0:
            errors.append(BatchError("empty_file", "The input file holds no request."))
        if errors:
            await self._fail(errors)
            return
        await self._save(
            record.advanced(
                BatchStatus.IN_PROGRESS,
                now=time.time(),
                num_requests=validator.num_lines,
                num_lines=number,
                model=context.model.check_name(model),
            )
        )

    async def _run_lines(self) -> None:
        slots = self._context.slots
        async with asyncio.TaskGroup() as tasks:
            async for number, line in self._undone_lines():
                await slots.acquire()
                # The callback, not the task, gives the slot back: a task can end unstarted.
                task = tasks.create_task(self._run_line(number, parse_line(line)))
                task.add_done_callback(lambda _: slots.release())

    async def _run_line(self, number: int, line: RequestLine) -> None:
        body = with_priority(bytes(line.body), self._context.priority)
        answer = await patient_answer(lambda: self._context.api.post(line.url, body))
        tokens = tokens_used(answer.body) if answer.status == 200 else None
        await self._put(number, answered(line.custom_id, answer), tokens)

    async def _put(self, number: int, line: ResultLine, tokens: dict[str, int] | None) -> None:
        counts = {"failed": 1} if tokens is None else {"completed": 1, **tokens}
        result = Result(tokens is None, line.encode())
        await self._store.put_result(self._record, number, result, counts)

    async def _end_early(self) -> None:
        status = BatchStatus.CANCELLED if self._is_cancelled else BatchStatus.EXPIRED
        if self._record.status is BatchStatus.IN_PROGRESS:
            async for number, line in self._undone_lines():
                result = unanswered(parse_line(line).custom_id, *_ENDINGS[status])
                await self._put(number, result, None)
        await self._finish(status)

    async def _finish(self, status: BatchStatus) -> None:
        """Makes files of the results; those of a router that died here are only found in lists."""
        files = self._context.files
        outputs, errors = files.writer(), files.writer()
        try:
            async for result in self._store.results(self._record):
                await (errors if result.failed else outputs).write(result.line)
            await self._save(
                self._record.advanced(
                    status,
                    now=time.time(),
                    output_file_id=await self._file_id(outputs, "output"),
                    error_file_id=await self._file_id(errors, "error"),
                )
            )
        except (LeaseLostError, asyncio.CancelledError):
            await outputs.discard()
            await errors.discard()
            raise
        await self._store.forget_results(self._record)

    async def _file_id(self, writer: FileWriter, kind: str) -> str | None:
        if writer.num_bytes == 0:
            return None
        file = await writer.finish(
            filename=f"{self._record.id}_{kind}.jsonl",
            purpose=OUTPUT_PURPOSE,
            ttl_s=self._record.output_ttl_s,
        )
        return file.id

    async def _undone_lines(self) -> AsyncIterator[tuple[int, bytes]]:
        done = await self._store.done_lines(self._record)
        async for number, line in self._context.files.lines(await self._input()):
            if number not in done:
                yield number, line

    async def _input(self) -> FileRecord:
        file_id = self._record.input_file_id
        record = await self._context.files.get(file_id)
        if record is None:
            raise FileGoneError(f"The input file `{file_id}` is gone.")
        return record

    async def _fail(self, errors: list[BatchError]) -> None:
        await self._save(self._record.advanced(BatchStatus.FAILED, now=time.time(), errors=errors))
        await self._store.forget_results(self._record)

    async def _save(self, record: BatchRecord) -> None:
        await self._store.save(record)
        self._record = record
