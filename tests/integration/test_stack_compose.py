"""The services of deploy/compose.yaml as processes: each one's very command and environment.

Only what a container network would provide is put in its place: names of hosts, ports, and the
path of the mounted secret.
"""

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import yaml
from redis_process import RedisServer
from tandem_stack import START_DEADLINE_S, wait_for

COMPOSE = Path(__file__).resolve().parents[2] / "deploy" / "compose.yaml"
KEY = "a-key-of-the-test"
CHAT = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class ComposeStack:
    """Starts services by their compose names, more than once if scaled."""

    def __init__(self, redis_url: str, directory: Path) -> None:
        self._services = yaml.safe_load(COMPOSE.read_text())["services"]
        secret = directory / "api_keys"
        secret.write_text(f"{KEY}\n")
        self.ports: dict[str, int] = {}
        self._redis_url = redis_url
        self._secret = secret
        self._processes: list[subprocess.Popen[bytes]] = []

    def start(self, service: str, replica: int = 1) -> "subprocess.Popen[bytes]":
        port = self.ports[f"{service}-{replica}"] = free_port()
        process = subprocess.Popen(
            [sys.executable, "-m", "cli", *self._services[service]["command"]],
            env={**self._inherited(), **self._environment(service, port)},
        )
        self._processes.append(process)
        return process

    def run_to_its_end(self, service: str) -> int:
        return self.start(service).wait(START_DEADLINE_S)

    def is_healthy(self, service: str, replica: int = 1) -> bool:
        """The service's own health check."""
        kind, program, *rest = self._services[service]["healthcheck"]["test"]
        assert (kind, program) == ("CMD", "python")
        port = str(self.ports[f"{service}-{replica}"])
        words = [word.replace("9100", port).replace("8000", port) for word in rest]
        return (
            subprocess.run([sys.executable, *words], stderr=subprocess.DEVNULL, check=False)
        ).returncode == 0

    def chat(self, key: str | None) -> httpx.Response:
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        url = f"http://127.0.0.1:{self.ports['router-1']}/v1"
        model = httpx.get(f"{url}/models", headers={"Authorization": f"Bearer {KEY}"}).json()
        body = CHAT | {"model": model["data"][0]["id"]}
        return httpx.post(f"{url}/chat/completions", json=body, headers=headers, timeout=60.0)

    def end(self) -> None:
        for process in self._processes:
            process.terminate()
        for process in self._processes:
            process.wait(START_DEADLINE_S)

    def _environment(self, service: str, port: int) -> dict[str, str]:
        places = {
            "redis://redis:6379/0": self._redis_url,
            "0.0.0.0": "127.0.0.1",
            "9100": str(port),
            "8000": str(port),
            "/run/secrets/api_keys": str(self._secret),
            "${TANDEM_MODEL:-smollm2}": "smollm2",
        }
        declared = self._services[service]["environment"]
        return {name: places.get(value, value) for name, value in declared.items()}

    @staticmethod
    def _inherited() -> dict[str, str]:
        return {name: value for name, value in os.environ.items() if not name.startswith("TANDEM")}


@pytest.fixture
def redis_not_started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    server = RedisServer(tmp_path_factory.mktemp("redis"))
    yield server
    server.kill()


@pytest.fixture
def compose(redis_not_started: RedisServer, tmp_path: Path) -> Iterator[ComposeStack]:
    stack = ComposeStack(redis_not_started.url, tmp_path)
    yield stack
    stack.end()


def test_any_start_order_converges_and_decode_scales(
    compose: ComposeStack, redis_not_started: RedisServer
):
    assert compose.run_to_its_end("model") == 0
    compose.start("decode", 1)
    compose.start("decode", 2)
    compose.start("router")
    prefill = compose.start("prefill")
    redis_not_started.start()
    for service, replica in (("decode", 1), ("decode", 2), ("prefill", 1), ("router", 1)):
        wait_for(
            lambda service=service, replica=replica: compose.is_healthy(service, replica),
            f"{service} {replica} to be healthy",
            START_DEADLINE_S,
        )
    assert compose.chat(None).status_code == 401
    assert compose.chat(KEY).status_code == 200

    prefill.kill()
    prefill.wait()
    compose.start("prefill")
    wait_for(lambda: compose.is_healthy("prefill"), "prefill to be back", START_DEADLINE_S)
    assert compose.chat(KEY).status_code == 200
