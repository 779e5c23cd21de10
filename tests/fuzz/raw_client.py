"""Plays raw requests to a server and judges what comes back."""

import asyncio
import contextlib
import json
import re
import socket
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NoReturn, Self

import h11
from raw_requests import Ending, RawRequest, make_request

ANSWER_S = 15.0
# How long an answer is waited for that needn't come, since the request has no end.
GRACE_S = 0.1
PAUSE_S = 0.001
NUM_CONNECTIONS = 8
ERROR_FIELDS = {"message", "type", "param", "code"}
# By which a stream ends whose events have types.
_LAST_EVENTS = ("completed", "incomplete", "failed", "message_stop", "error")

Address = tuple[str, int]


class WrongAnswerError(Exception):
    """The server did what it must not do."""


class BrokenOffError(WrongAnswerError):
    """An answer ended before its end."""


@dataclass(slots=True)
class Answer:
    status: int
    headers: dict[bytes, bytes]
    body: bytes

    @property
    def content_type(self) -> bytes:
        return self.headers.get(b"content-type", b"").split(b";")[0]


@dataclass(slots=True)
class FuzzResult:
    """`statuses` counts answers; `wrong` has what was wrong, by seed."""

    statuses: dict[int, int] = field(default_factory=dict)
    wrong: dict[int, str] = field(default_factory=dict)

    def check(self) -> None:
        reports = [
            f"{text}\n  {_shown(make_request(seed))}\n"
            f'  again: make fuzz ARGS="--fuzz-seed={seed} --fuzz-requests=1"'
            for seed, text in list(self.wrong.items())[:10]
        ]
        assert not reports, f"{len(self.wrong)} wrong:\n" + "\n".join(reports)


async def fuzz(address: Address, seeds: Iterable[int]) -> FuzzResult:
    """Every seed's request, over several connections at a time."""
    result = FuzzResult()
    todo = iter(seeds)

    async def work() -> None:
        for seed in todo:
            request = make_request(seed)
            try:
                for answer in await play(address, request):
                    result.statuses[answer.status] = result.statuses.get(answer.status, 0) + 1
            except WrongAnswerError as error:
                result.wrong[seed] = f"seed {seed}: {error}"

    async with asyncio.TaskGroup() as tasks:
        for _ in range(NUM_CONNECTIONS):
            tasks.create_task(work())
    return result


async def play(address: Address, request: RawRequest) -> list[Answer]:
    """Raises WrongAnswerError."""
    connection = await _Connection.open(address)
    is_complete, method = _what_it_is(request.data)
    answers: list[Answer] = []
    try:
        await _send(connection, request)
        match request.ending:
            case Ending.HANG_UP:
                return []
            case Ending.READ_SOME:
                with contextlib.suppress(TimeoutError, _EndError):
                    await asyncio.wait_for(connection.until(b"\r\n"), GRACE_S)
                return []
            case Ending.HALF_CLOSE:
                with contextlib.suppress(OSError):
                    connection.socket.shutdown(socket.SHUT_WR)
        must_answer = is_complete and request.ending is Ending.READ
        deadline_s = ANSWER_S if must_answer or request.ending is Ending.HALF_CLOSE else GRACE_S
        try:
            async with asyncio.timeout(deadline_s):
                while len(answers) < request.num_requests:
                    answer = await _read_answer(connection, is_head=method == b"HEAD")
                    if answer is None:
                        break
                    answers.append(answer)
                    if answer.headers.get(b"connection") == b"close":
                        break
        except BrokenOffError:
            # A client that has said that it's done counts as gone.
            if request.ending is not Ending.HALF_CLOSE:
                raise
        except TimeoutError:
            if deadline_s == ANSWER_S:
                raise WrongAnswerError(f"no answer in {ANSWER_S} s") from None
        if must_answer and not answers:
            raise WrongAnswerError("the connection ended without an answer")
    finally:
        connection.socket.close()
    for answer in answers:
        check(answer, is_head=method == b"HEAD")
    return answers


async def _send(connection: "_Connection", request: RawRequest) -> None:
    loop = asyncio.get_running_loop()
    # The server may have had enough before it has heard everything.
    with contextlib.suppress(ConnectionError):
        async with asyncio.timeout(ANSWER_S):
            for part in request.parts:
                await loop.sock_sendall(connection.socket, part)
                if len(request.parts) > 1:
                    await asyncio.sleep(PAUSE_S)


def _what_it_is(data: bytes) -> tuple[bool, bytes]:
    """Whether it's a whole HTTP request in the eyes of another parser, and its method."""
    parser = h11.Connection(h11.SERVER, max_incomplete_event_size=1 << 30)
    method = data.lstrip(b"\r\n").split(b" ")[0]
    try:
        parser.receive_data(data)
        while True:
            event = parser.next_event()
            if isinstance(event, h11.EndOfMessage):
                return True, method
            if event is h11.NEED_DATA or isinstance(event, h11.ConnectionClosed):
                return False, method
    except h11.RemoteProtocolError:
        return False, method


_STATUS_LINE = re.compile(rb"HTTP/1\.1 ([1-5]\d\d)( [^\r\n]*)?")


class _EndError(Exception):
    """Nothing more comes over a connection."""


class _Connection:
    """A socket and what came from it, which a failed write leaves readable, unlike a stream's."""

    def __init__(self, opened: socket.socket) -> None:
        self.socket = opened
        self._data = b""

    @classmethod
    async def open(cls, address: Address) -> Self:
        made = socket.socket()
        made.settimeout(0)
        await asyncio.get_running_loop().sock_connect(made, address)
        return cls(made)

    async def until(self, end: bytes) -> bytes:
        while (at := self._data.find(end)) < 0:
            await self._receive()
        return self._take(at + len(end))

    async def exactly(self, size: int) -> bytes:
        while len(self._data) < size:
            await self._receive()
        return self._take(size)

    @property
    def left(self) -> bytes:
        return self._data

    def _take(self, size: int) -> bytes:
        taken, self._data = self._data[:size], self._data[size:]
        return taken

    async def _receive(self) -> None:
        try:
            data = await asyncio.get_running_loop().sock_recv(self.socket, 1 << 16)
        except ConnectionError as error:
            raise _EndError(repr(error)) from error
        if not data:
            raise _EndError("closed")
        self._data += data


async def _read_answer(connection: _Connection, *, is_head: bool) -> Answer | None:
    """None at the connection's end."""
    while True:
        try:
            head = await connection.until(b"\r\n\r\n")
        except _EndError:
            if connection.left:
                _wrong(f"half an answer: {connection.left[:200]!r}")
            return None
        first, *lines = head[:-4].split(b"\r\n")
        matched = _STATUS_LINE.fullmatch(first)
        if matched is None:
            _wrong(f"no HTTP answer: {head[:200]!r}")
        headers = dict(_header(line) for line in lines)
        status = int(matched[1])
        if status >= 200:
            body = b"" if is_head else await _read_body(connection, headers)
            return Answer(status, headers, body)


def _header(line: bytes) -> tuple[bytes, bytes]:
    name, _, value = line.partition(b":")
    return name.lower(), value.strip()


async def _read_body(connection: _Connection, headers: dict[bytes, bytes]) -> bytes:
    body = b""
    try:
        if headers.get(b"transfer-encoding") != b"chunked":
            return await connection.exactly(int(headers.get(b"content-length", b"0")))
        while True:
            size = int(await connection.until(b"\r\n"), 16)
            chunk = await connection.exactly(size + 2)
            if not size:
                return body
            body += chunk[:-2]
    except _EndError as error:
        text = f"the answer breaks off, {error}, behind {body[-200:] + connection.left[-200:]!r}"
        raise BrokenOffError(text) from error


def check(answer: Answer, *, is_head: bool = False) -> None:
    """Raises WrongAnswerError."""
    if answer.status >= 500 or answer.status == 499 or 300 <= answer.status < 400:
        _wrong(f"status {answer.status}: {answer.body[:300]!r}")
    if is_head:
        return
    if answer.status >= 400:
        _check_error(answer)
    elif answer.content_type == b"application/json":
        _parsed(answer.body)
    elif answer.content_type == b"text/event-stream":
        *events, nothing = answer.body.split(b"\n\n")
        datas = [event.rpartition(b"data: ")[2] for event in events]
        if nothing or not datas:
            _wrong(f"a stream without end: {answer.body[-200:]!r}")
        last = datas.pop()
        if last != b"[DONE]" and not _parsed(last)["type"].endswith(_LAST_EVENTS):
            _wrong(f"a stream without end: {answer.body[-200:]!r}")
        for data in datas:
            _parsed(data)


def _check_error(answer: Answer) -> None:
    if answer.content_type != b"application/json":
        _wrong(f"status {answer.status} as {answer.content_type!r}: {answer.body[:300]!r}")
    body = _parsed(answer.body)
    error = body.get("error")
    fields = {"message", "type"} if body.get("type") == "error" else ERROR_FIELDS
    if not isinstance(error, dict) or set(error) != fields:
        _wrong(f"no error of OpenAI's shape: {answer.body[:300]!r}")
    if not error["message"] or not isinstance(error.get("param"), str | None):
        _wrong(f"an error that says nothing: {answer.body[:300]!r}")


def _parsed(data: bytes) -> Any:
    try:
        return json.loads(data, parse_constant=_wrong)
    except ValueError as error:
        _wrong(f"no JSON, {error}: {data[:300]!r}")


def _wrong(text: str) -> NoReturn:
    raise WrongAnswerError(text)


def _shown(request: RawRequest) -> str:
    def texts() -> Iterator[str]:
        for part in request.parts:
            yield repr(part if len(part) < 1500 else part[:700] + b" ... " + part[-700:])

    return f"{request.ending} behind {' | '.join(texts())}"
