"""`tandem run-batch`: answers a file of requests, by a stack of its own or a running server.

Results are written as they come, so a run that ends early can be started again: it asks for what
is missing.
"""

import asyncio
import dataclasses
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import msgspec
from tqdm import tqdm

from cli.batch_file import RequestFile, ResultFile, is_same_file
from cli.declarations import RUN_BATCH
from cli.resolve import Settings, resolve
from cli.serve import run_stack
from cli.stack_config import RunBatchConfig
from loadtest.http_connection import HttpClient, HttpError
from protocol.decoding import decode
from protocol.errors import StartupError, UnreadableError
from services.router.batch.answer import Answer, patient_answer
from services.router.batch.lines import RequestLine, answered
from services.router.config import RouterConfig

INTERRUPTED_STATUS = 130
# Longer than a server gives a request.
_ANSWER_DEADLINE_S = 4000.0
_MAX_CONNECT_FAILURES = 5
_CONNECT_PAUSE_S = 1.0

_any_json = msgspec.json.Decoder()


def run(argv: Sequence[str]) -> int:
    """0 if every request was answered well, 1 if one wasn't, 130 after a signal.

    StartupError if a file is bad, or nobody answers.
    """
    settings = resolve(RUN_BATCH, argv)
    config = settings.config(RunBatchConfig)
    if config.input_file is None or config.output_file is None:
        raise StartupError("Name the files of requests and of results: -i FILE -o FILE.")
    source, target = Path(config.input_file), Path(config.output_file)
    requests = RequestFile(source)
    if is_same_file(source, target):
        raise StartupError("-i and -o name the same file.")
    with ResultFile(target, requests) as results:
        job = BatchJob(requests, results, settings)
        if job.num_left == 0:
            sys.stderr.write(f"All {len(requests.custom_ids)} requests have results already.\n")
            return 0
        if config.url is not None:
            asyncio.run(job.run(config.url))
        else:
            _run_with_stack(settings, job)
    return job.report(target)


def _run_with_stack(settings: Settings, job: "BatchJob") -> None:
    fixed = {"host": "127.0.0.1", "port": 0, "api_key_file": None, "disable_log_requests": True}
    router = settings.config(RouterConfig, fd=None, **fixed)
    settings = dataclasses.replace(settings, values=dict(settings.values) | fixed)
    run_stack(settings, router, work=job.run)


class BatchJob:
    """Sends what has no result yet to a server."""

    def __init__(self, requests: RequestFile, results: ResultFile, settings: Settings) -> None:
        keys = settings.values["api_key"]
        self._requests = requests
        self._results = results
        self._api_key = keys[0] if isinstance(keys, tuple) and keys else None
        self._max_concurrency = settings.config(RunBatchConfig).max_concurrency
        self._num_answered = 0
        self._num_failed = 0
        self.num_left = len(requests.custom_ids) - len(results.done)

    async def run(self, url: str) -> None:
        """StartupError if nobody answers at `url`."""
        url = url.rstrip("/").removesuffix("/v1")
        missing = (
            request
            for request in self._requests.requests()
            if request.custom_id not in self._results.done
        )
        num_tasks = min(self._max_concurrency, self.num_left)
        try:
            # Without a terminal there is no bar.
            with tqdm(total=self.num_left, unit="request", disable=None) as bar:
                async with HttpClient(url, api_key=self._api_key) as http, asyncio.TaskGroup() as g:
                    for _ in range(num_tasks):
                        g.create_task(self._answer_all(missing, http, bar.update))
        except BaseExceptionGroup as group:
            # The first failure cancelled the others.
            raise group.exceptions[0] from None

    def report(self, target: Path) -> int:
        """Says how it went; returns the exit status."""
        if self._num_answered < self.num_left:
            sys.stderr.write(
                f"{self.num_left - self._num_answered} requests are left; run again to go on.\n"
            )
            return INTERRUPTED_STATUS
        failures = f", {self._num_failed} of them errors" if self._num_failed else ""
        sys.stderr.write(f"{self._num_answered} results{failures} were added to {target}.\n")
        return 1 if self._num_failed else 0

    async def _answer_all(
        self, missing: Iterator[RequestLine], http: HttpClient, on_result: Callable[[], object]
    ) -> None:
        for request in missing:
            answer = await patient_answer(lambda request=request: _ask(http, request))
            self._results.add(answered(request.custom_id, answer))
            self._num_answered += 1
            self._num_failed += answer.status != 200
            on_result()


async def _ask(http: HttpClient, request: RequestLine) -> Answer:
    num_failures = 0
    while True:
        try:
            async with asyncio.timeout(_ANSWER_DEADLINE_S):
                status, body = await http.fetch("POST", request.url, body=bytes(request.body))
        except (HttpError, TimeoutError) as error:
            num_failures += 1
            if num_failures == _MAX_CONNECT_FAILURES:
                raise StartupError(
                    f"The server doesn't answer: {error or 'timeout'}; run again to go on."
                ) from error
            await asyncio.sleep(_CONNECT_PAUSE_S)
        else:
            return Answer(status, _one_line(body))


def _one_line(body: bytes) -> bytes:
    """Other servers may write JSON on several lines, and proxies none at all."""
    try:
        return msgspec.json.encode(decode(_any_json, body))
    except UnreadableError:
        return msgspec.json.encode({"error": {"message": body.decode(errors="replace")}})
