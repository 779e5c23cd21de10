"""Sends one request and notes when the pieces of its answer arrive."""

import asyncio
import time
from itertools import pairwise

from loadtest.config import BenchConfig
from loadtest.http_connection import HttpClient, HttpError
from loadtest.openai_stream import PATHS, Answer, EventSplitter, decode_answer, request_body
from loadtest.results import RequestResult
from loadtest.workload import PlannedRequest
from protocol.errors import UnreadableError

_END_OF_STREAM = b"[DONE]"


class AnswerReader:
    """Takes an answer's body piece by piece; `arrivals_s` are the times of pieces with text."""

    def __init__(self, *, stream: bool) -> None:
        self._splitter = EventSplitter() if stream else None
        self._whole = b""
        self._ended = False
        self._error: str | None = None
        self.arrivals_s: list[float] = []
        self.finish_reason: str | None = None
        self.prompt_tokens = 0
        self.cached_tokens: int | None = None
        self.output_tokens: int | None = None

    def feed(self, chunk: bytes, received_s: float) -> None:
        """`chunk` of the body, received at `received_s` of the performance counter."""
        if self._splitter is None:
            self._whole += chunk
            return
        for data in self._splitter.feed(chunk):
            if data == _END_OF_STREAM:
                self._ended = True
            elif self._take(data):
                self.arrivals_s.append(received_s)

    def problem(self, status: int) -> str | None:
        """After the whole body: what was wrong with the answer, in a few words."""
        if status != 200:
            return f"HTTP {status}"
        if self._splitter is None:
            self._take(self._whole)
        elif self._error is None and not self._ended:
            return "stream ended early"
        return self._error

    def _take(self, data: bytes) -> bool:
        """Notes what `data` says; true if it brought text."""
        try:
            answer = decode_answer(data)
        except UnreadableError:
            self._error = "answer isn't OpenAI's"
            return False
        if answer.error is not None:
            self._error = "error in the answer"
            return False
        self._note(answer)
        return bool(answer.text)

    def _note(self, answer: Answer) -> None:
        self.finish_reason = answer.finish_reason or self.finish_reason
        if answer.usage is not None:
            self.prompt_tokens = answer.usage.prompt_tokens
            self.output_tokens = answer.usage.completion_tokens
            details = answer.usage.prompt_tokens_details
            self.cached_tokens = None if details is None else details.cached_tokens


class LoadClient:
    """Sends planned requests to one server and never raises for what the server does."""

    def __init__(self, http: HttpClient, config: BenchConfig, model: str) -> None:
        self._http = http
        self._config = config
        self._model = model

    async def send(
        self, request: PlannedRequest, *, index: int, start_s: float, due_s: float
    ) -> RequestResult:
        """One request; `start_s` and `due_s` are times of the performance counter."""
        reader = AnswerReader(stream=self._config.stream)
        body = request_body(self._config, self._model, request)
        status: int | None = None
        sent_s = time.perf_counter()
        try:
            async with asyncio.timeout(self._config.request_timeout_s):
                status = await self._http.request(
                    "POST", PATHS[self._config.endpoint], reader.feed, body=body
                )
            error = reader.problem(status)
        except TimeoutError:
            error = "timeout"
        except HttpError as failure:
            error = str(failure)
        return _result(
            reader,
            RequestResult(
                index=index,
                start_s=sent_s - start_s,
                late_s=max(0.0, sent_s - due_s),
                error=error,
                status=status,
                end_to_end_s=time.perf_counter() - sent_s,
            ),
            sent_s,
        )


def _result(reader: AnswerReader, result: RequestResult, sent_s: float) -> RequestResult:
    arrivals_s = reader.arrivals_s
    result.finish_reason = reader.finish_reason
    result.prompt_tokens = reader.prompt_tokens
    result.cached_tokens = reader.cached_tokens
    # Without a usage record, a piece is taken for a token.
    result.output_tokens = len(arrivals_s) if reader.output_tokens is None else reader.output_tokens
    if arrivals_s:
        result.first_token_s = arrivals_s[0] - sent_s
        result.end_to_end_s = arrivals_s[-1] - sent_s
        result.gaps_s = [after - before for before, after in pairwise(arrivals_s)]
    return result
