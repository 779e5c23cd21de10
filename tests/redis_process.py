"""A real redis-server that tests start, kill and start again."""

import subprocess
import time
from pathlib import Path

import redis

from cli.redis_server import find_redis_server, redis_arguments, redis_socket_url

START_DEADLINE_S = 20.0


class RedisServer:
    """A real redis-server on a Unix socket that tests may stop, kill and start again, empty."""

    def __init__(self, directory: Path) -> None:
        self._socket = directory / "redis.sock"
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return redis_socket_url(self._socket)

    def start(self) -> None:
        self._process = subprocess.Popen(redis_arguments(find_redis_server(), self._socket))
        deadline_s = time.monotonic() + START_DEADLINE_S
        with redis.Redis.from_url(self.url) as client:
            while not self._answers(client):
                assert self._process.poll() is None, "redis-server ended at once"
                assert time.monotonic() < deadline_s, "redis-server doesn't answer"
                time.sleep(0.01)

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None
            self._socket.unlink(missing_ok=True)

    @staticmethod
    def _answers(client: redis.Redis) -> bool:
        try:
            return bool(client.ping())
        except redis.ConnectionError:
            return False
