"""/metrics and /health of a worker, over HTTP on a thread of their own."""

import asyncio
import socket
import threading
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest

from protocol.errors import StartupError
from services.runtime.addresses import announced_host

LOOP_ANSWER_S = 2.0
READ_TIMEOUT_S = 10.0


class MetricsServer:
    """/health is 200 if the event loop answers within two seconds, 503 otherwise: a thread alone
    would still call a wedged process healthy. Make it inside the running loop."""

    def __init__(self, registry: CollectorRegistry, *, host: str, port: int) -> None:
        """Port 0 takes a free one. Raises StartupError if the address is taken."""
        self._loop = asyncio.get_running_loop()
        try:
            self._server = _Server((host, port), registry, self._loop_answers)
        except OSError as error:
            raise StartupError(
                f"--metrics-port: cannot listen on {host}:{port}: {error.strerror}"
            ) from error
        self._thread = threading.Thread(
            target=self._server.serve_forever, name="metrics", daemon=True
        )
        self._thread.start()
        self.address = f"http://{announced_host(host)}:{self._server.server_port}"

    def close(self) -> None:
        # Wakes the thread, which would see the end only at its next look, each half second.
        self._server.socket.shutdown(socket.SHUT_RDWR)
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def _loop_answers(self) -> bool:
        answered = threading.Event()
        try:
            self._loop.call_soon_threadsafe(answered.set)
        except RuntimeError:
            return False  # the loop is closed
        return answered.wait(LOOP_ANSWER_S)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    # A scraper that hangs doesn't keep the process from ending.
    block_on_close = False

    def __init__(
        self,
        address: tuple[str, int],
        registry: CollectorRegistry,
        is_healthy: Callable[[], bool],
    ) -> None:
        self.registry = registry
        self.is_healthy = is_healthy
        super().__init__(address, _Handler)


class _Handler(BaseHTTPRequestHandler):
    server: _Server  # pyright: ignore[reportIncompatibleVariableOverride]
    timeout = READ_TIMEOUT_S

    def do_GET(self) -> None:
        match urlsplit(self.path).path:
            case "/metrics":
                self._answer(HTTPStatus.OK, generate_latest(self.server.registry))
            case "/health":
                healthy = self.server.is_healthy()
                self._answer(HTTPStatus.OK if healthy else HTTPStatus.SERVICE_UNAVAILABLE, b"")
            case _:
                self._answer(HTTPStatus.NOT_FOUND, b"")

    def _answer(self, status: HTTPStatus, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", CONTENT_TYPE_LATEST)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002, ANN401
        """Scrapes aren't news."""
