import socket

import pytest

from cli.listen import bind_listeners, bound_port, reachable_host
from protocol.errors import StartupError


def test_several_listeners_share_one_port():
    listeners = bind_listeners("127.0.0.1", 0, count=3)
    try:
        assert len({bound_port(listener) for listener in listeners}) == 1
    finally:
        for listener in listeners:
            listener.close()


@pytest.mark.parametrize("count", [1, 2])
def test_a_port_in_use_is_refused_with_its_number(count):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(StartupError, match=f"Port {port} on 127.0.0.1 is in use"):
            bind_listeners("127.0.0.1", port, count=count)


def test_a_foreign_address_is_refused():
    with pytest.raises(StartupError, match=r"192\.0\.2\.1"):
        bind_listeners("192.0.2.1", 0, count=1)


@pytest.mark.parametrize(
    ("host", "wanted"),
    [("0.0.0.0", "127.0.0.1"), ("::", "[::1]"), ("::1", "[::1]"), ("localhost", "localhost")],
)
def test_wildcards_are_reached_over_loopback(host, wanted):
    assert reachable_host(host) == wanted
