"""The sockets that routers serve on, bound before anything else starts."""

import errno
import socket

from protocol.errors import StartupError


def bind_listeners(host: str, port: int, *, count: int) -> list[socket.socket]:
    """`count` sockets bound to one address, of which the kernel spreads new connections.

    They outlive a router that crashes, so that clients wait for its successor instead of being
    refused. StartupError if the address can't be had.
    """
    first = _bind(host, port, shared=False)
    if count == 1:
        return [first]
    # Only a socket that doesn't share shows that nobody else has the port.
    port = bound_port(first)
    first.close()
    return [_bind(host, port, shared=True) for _ in range(count)]


def bound_port(listener: socket.socket) -> int:
    return int(listener.getsockname()[1])


def reachable_host(host: str) -> str:
    """`host` as a client on this machine names it, in a URL's form."""
    if host in ("", "0.0.0.0"):  # noqa: S104  (compared, not bound)
        return "127.0.0.1"
    if host == "::":
        return "[::1]"
    return f"[{host}]" if ":" in host else host


def _bind(host: str, port: int, *, shared: bool) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except socket.gaierror as error:
        raise StartupError(f"--host {host} is no address of this machine.") from error
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if shared:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        listener.bind(address)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise StartupError(
                f"Port {port} on {host} is in use; choose another one with --port."
            ) from error
        raise StartupError(f"Can't listen on {host}:{port}: {error.strerror}.") from error
    return listener
