"""A small HTTP/1.1 client: the load generator shares the machine with what it measures."""

import asyncio
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Self
from urllib.parse import urlsplit

import httptools

from protocol.errors import StartupError


@dataclass(frozen=True, slots=True)
class Target:
    """Where a base URL leads. `prefix` precedes each path."""

    host: str
    port: int
    prefix: str
    tls: bool

    @classmethod
    def parse(cls, base_url: str) -> "Target":
        """Raises StartupError if `base_url` isn't an HTTP URL."""
        parts = urlsplit(base_url if "//" in base_url else f"http://{base_url}")
        try:
            port = parts.port
        except ValueError:
            port = 0
        if parts.scheme not in ("http", "https") or not parts.hostname or port == 0:
            raise StartupError(f"{base_url} is no http:// or https:// URL.")
        tls = parts.scheme == "https"
        return cls(parts.hostname, port or (443 if tls else 80), parts.path.rstrip("/"), tls)


class HttpError(Exception):
    """The connection failed or what came isn't HTTP."""


class _Exchange(asyncio.Protocol):
    """The bytes of one connection; feeds `on_body(chunk, time_s)` of the response in progress."""

    def __init__(self) -> None:
        self._parser: httptools.HttpResponseParser | None = None
        self._done: asyncio.Future[int] | None = None
        self._on_body: Callable[[bytes, float], None] | None = None
        self._received_s = 0.0
        self.transport: asyncio.Transport | None = None
        self.reusable = True

    def begin(self, on_body: Callable[[bytes, float], None]) -> "asyncio.Future[int]":
        """The status of the next response, once it's complete."""
        self._parser = httptools.HttpResponseParser(self)
        self._on_body = on_body
        self._done = asyncio.get_running_loop().create_future()
        return self._done

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        # One time for all that arrived together: parsing mustn't be part of what is measured.
        self._received_s = time.perf_counter()
        if self._parser is None:
            return
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._fail(f"not HTTP: {error}")

    def connection_lost(self, exc: Exception | None) -> None:
        self.reusable = False
        self._fail("connection lost" if exc is None else f"connection lost: {exc}")

    def on_body(self, body: bytes) -> None:
        """httptools' callback."""
        if self._on_body is not None:
            self._on_body(body, self._received_s)

    def on_message_complete(self) -> None:
        """httptools' callback."""
        assert self._parser is not None
        self.reusable = self.reusable and self._parser.should_keep_alive()
        if self._done is not None and not self._done.done():
            self._done.set_result(self._parser.get_status_code())

    def _fail(self, reason: str) -> None:
        if self._done is not None and not self._done.done():
            self._done.set_exception(HttpError(reason))


class HttpClient:
    """Requests to one server over connections that are kept for reuse."""

    def __init__(self, base_url: str, *, api_key: str | None = None) -> None:
        self._target = Target.parse(base_url)
        self._idle: list[_Exchange] = []
        self._authorization = "" if api_key is None else f"Authorization: Bearer {api_key}\r\n"

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for exchange in self._idle:
            if exchange.transport is not None:
                exchange.transport.close()
        self._idle.clear()
        # Sockets are closed by the loop's next turn.
        await asyncio.sleep(0)

    async def request(
        self,
        method: str,
        path: str,
        on_body: Callable[[bytes, float], None],
        *,
        body: bytes = b"",
    ) -> int:
        """The response's status, when all of its body has gone to `on_body(chunk, received_s)`.

        Raises HttpError if there is no complete response.
        """
        exchange = await self._connection()
        assert exchange.transport is not None
        done = exchange.begin(on_body)
        exchange.transport.write(self._head(method, path, len(body)) + body)
        try:
            status = await done
        except BaseException:
            # Cancelled or broken: closing tells the server that nobody waits any more.
            exchange.transport.abort()
            raise
        if exchange.reusable:
            self._idle.append(exchange)
        else:
            exchange.transport.close()
        return status

    async def fetch(self, method: str, path: str, *, body: bytes = b"") -> tuple[int, bytes]:
        """Status and whole body."""
        chunks: list[bytes] = []
        status = await self.request(method, path, lambda chunk, _: chunks.append(chunk), body=body)
        return status, b"".join(chunks)

    async def _connection(self) -> _Exchange:
        while self._idle:
            exchange = self._idle.pop()
            if exchange.reusable:
                return exchange
        target = self._target
        context = ssl.create_default_context() if target.tls else None
        try:
            _, exchange = await asyncio.get_running_loop().create_connection(
                _Exchange, target.host, target.port, ssl=context
            )
        except OSError as error:
            raise HttpError(f"can't connect to {target.host}:{target.port}: {error}") from error
        return exchange

    def _head(self, method: str, path: str, num_bytes: int) -> bytes:
        target = self._target
        return (
            f"{method} {target.prefix}{path} HTTP/1.1\r\n"
            f"Host: {target.host}:{target.port}\r\n{self._authorization}"
            f"Content-Type: application/json\r\nContent-Length: {num_bytes}\r\n\r\n"
        ).encode()
