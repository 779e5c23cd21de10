"""The socket that a router serves HTTP on."""

import socket

from protocol.errors import StartupError
from services.router.config import RouterConfig


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
