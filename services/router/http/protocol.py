"""uvicorn's HTTP protocol, for clients in a hurry and for those that mean no good.

A response's head and the first part of its body leave in one write: apart they are two system calls
here and two wakeups of the client, a sixth of the CPU time of a short request. What is no HTTP is
refused in the API's own words, a request's head is bounded in size and time, and everybody whose
client is gone hears of it.
"""

import asyncio
import http
from typing import Any

from uvicorn._types import ASGI3Application
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from services.router.http.client import Client
from services.router.http.errors import HttpError, error_reply

MAX_HEAD_BYTES = 64 << 10
# How long a request's head may take, and its body pause.
HEAD_TIMEOUT_S = 60.0
SILENCE_S = 60.0
_HEAD = b"HTTP/1."


class HeadGatheringTransport(asyncio.Transport):
    """Holds back a response's head until more is written, at most until the loop's next turn."""

    def __init__(self, transport: asyncio.Transport) -> None:
        super().__init__()
        self._transport = transport
        self._loop = asyncio.get_running_loop()
        self._head = b""

    def write(self, data: bytes | bytearray | memoryview) -> None:
        head, self._head = self._head, b""
        if head:
            self._transport.write(head + bytes(data))
        elif bytes(data[: len(_HEAD)]) == _HEAD:
            self._head = bytes(data)
            self._loop.call_soon(self._flush)
        else:
            self._transport.write(data)

    def close(self) -> None:
        self._flush()
        self._transport.close()

    def abort(self) -> None:
        self._head = b""
        self._transport.abort()

    def is_closing(self) -> bool:
        return self._transport.is_closing()

    def get_extra_info(self, name: str, default: Any = None) -> Any:  # noqa: ANN401
        return self._transport.get_extra_info(name, default)

    def pause_reading(self) -> None:
        self._transport.pause_reading()

    def resume_reading(self) -> None:
        self._transport.resume_reading()

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        self._transport.set_protocol(protocol)

    def _flush(self) -> None:
        if self._head:
            head, self._head = self._head, b""
            self._transport.write(head)


class HttpProtocol(HttpToolsProtocol):
    """`cycle` is the request whose bytes come in; with pipelining an earlier one is `_answered`."""

    _answered: RequestResponseCycle | None = None
    _refusal: HttpError | None = None
    _in_head = False
    _in_body = False
    _is_fresh = True
    _num_data_bytes = 0
    _num_head_bytes = 0
    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        super().connection_made(HeadGatheringTransport(transport))
        self._in_head = True
        self._start_timer(HEAD_TIMEOUT_S)

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        if self._answered is not None and not self._answered.response_complete:
            self._answered.disconnected = True
            self._answered.message_event.set()
            Client.of(self._answered.scope).left()
        self.pipeline.clear()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        self._num_data_bytes = len(data)
        self._is_fresh = not self._in_body
        super().data_received(data)
        if self._in_head:
            self._num_head_bytes += len(data)
            if self._timer is None:
                self._start_timer(HEAD_TIMEOUT_S)
            if self._num_head_bytes > MAX_HEAD_BYTES:
                self._refusal = _too_long()
                self.send_400_response("")
        elif self._in_body:
            self._stop_timer()
            self._start_timer(SILENCE_S)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self.scope["extensions"] = Client().as_extension()
        self._in_head = True
        # Data behind another request's body in the same read isn't counted; such a read is bounded.
        self._num_head_bytes = 0 if self._is_fresh else -self._num_data_bytes

    def on_headers_complete(self) -> None:
        self._in_head = False
        if self._timer is not None:
            self._stop_timer()
        if self._num_data_bytes > MAX_HEAD_BYTES or self._num_head_bytes > 0:
            size = len(self.url) + sum(len(name) + len(value) for name, value in self.headers)
            if size > MAX_HEAD_BYTES:
                self._refusal = _too_long()
                raise self._refusal  # stops the parser, which has `send_400_response` called
        self._in_body = True
        self._is_fresh = False
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        self._in_body = False
        if self._timer is not None:
            self._stop_timer()
        super().on_message_complete()
        if self.cycle is self._answered:
            # A long body stops the reading, by which we would hear that the client leaves.
            self.flow.resume_reading()

    def send_400_response(self, msg: str) -> None:
        """Refuses what isn't HTTP, after the answer to what was."""
        self._in_head = self._in_body = False
        self._stop_timer()
        running = self._answered
        if running is not None and not running.response_complete:
            is_whole = running is not self.cycle or not running.more_body
            if is_whole:
                # A second answer in the middle of the first would garble it.
                self.pipeline.clear()
                running.keep_alive = False
                return
            if running.response_started:
                self.transport.close()
                return
        error = self._refusal or HttpError(400, f"{msg}".strip(), code="invalid_http")
        reply = error_reply(error)
        phrase = http.HTTPStatus(reply.status).phrase
        head = (
            f"HTTP/1.1 {reply.status} {phrase}\r\ncontent-type: application/json\r\n"
            f"content-length: {len(reply.body)}\r\nconnection: close\r\n\r\n"
        )
        self.transport.write(head.encode() + reply.body)
        self.transport.close()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGI3Application) -> None:
        self._answered = cycle
        super()._start_asgi_task(cycle, app)

    def _start_timer(self, delay_s: float) -> None:
        self._timer = self.loop.call_later(delay_s, self._waited)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _waited(self) -> None:
        """For the rest of a request, and long enough if it's the client that doesn't send it."""
        answered = self._answered
        is_busy = answered is not None and not answered.response_complete
        if is_busy and (answered is not self.cycle or self._in_head or self.flow.read_paused):
            self._start_timer(SILENCE_S)
        elif self._in_head or not is_busy:
            # Nothing is asked, or it's answered already.
            self.transport.close()
        else:
            text = f"Nothing more of the request's body came in {SILENCE_S:.0f} s."
            self._refusal = HttpError(408, text, code="request_timeout")
            self.send_400_response("")


def _too_long() -> HttpError:
    return HttpError(
        431, f"A request's head may have at most {MAX_HEAD_BYTES} bytes.", code="head_too_large"
    )
