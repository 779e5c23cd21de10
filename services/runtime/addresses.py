"""The host that peers are told, where it differs from the one that is bound."""

import socket

_WILDCARDS = ("0.0.0.0", "::", "*")  # noqa: S104


def announced_host(bound_host: str) -> str:
    """A wildcard isn't an address that anybody could connect to: peers get our host's name."""
    return socket.gethostname() if bound_host in _WILDCARDS else bound_host
