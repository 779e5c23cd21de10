"""The server below the app, and the socket that it listens on."""

import contextlib
import socket
from collections.abc import Generator

import uvicorn
from fastapi import FastAPI

from protocol.errors import StartupError
from services.router.config import RouterConfig
from services.router.http.protocol import HttpProtocol

KEEP_ALIVE_S = 75


class _HttpServer(uvicorn.Server):
    """Leaves signals to us: uvicorn would raise them again after its end, before ours."""

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None]:
        yield


def make_server(app: FastAPI, *, drain_timeout_s: float) -> uvicorn.Server:
    """A server without access log, for sockets that are bound already."""
    return _HttpServer(
        uvicorn.Config(
            app,
            http=HttpProtocol,
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_keep_alive=KEEP_ALIVE_S,
            timeout_graceful_shutdown=round(drain_timeout_s),
        )
    )


def open_listener(config: RouterConfig) -> socket.socket:
    """The inherited socket, or one of our own that further routers may share the port with."""
    if config.fd is not None:
        try:
            return socket.socket(fileno=config.fd)
        except OSError as error:
            raise StartupError(f"--fd {config.fd} is no socket: {error.strerror}.") from error
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((config.host, config.port))
    except OSError as error:
        listener.close()
        raise StartupError(
            f"Can't listen on {config.host}:{config.port}: {error.strerror or error}."
        ) from error
    return listener
