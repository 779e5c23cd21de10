"""What a router costs: a real router process over a worker without a model.

    python -m benchmarks.router.overhead [--output FILE]

Measures, on one machine and with the built-in model's tokenizer:

- added latency: a one-token chat over HTTP, less the same request sent to the worker directly
  over the control channel, one at a time;
- requests/s of such chats over 64 connections, not streamed;
- streams: 256 of them, one token a step and stream, at a pace that the router keeps up with;
  tokens/s a core = tokens delivered ÷ CPU seconds of the router process;
- the same as fast as it goes, where several tokens share an event.

The client and the worker share the machine's cores with the router: its CPU time is what counts.
"""

import argparse
import asyncio
import itertools
import json
import platform
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import psutil
import uvloop

from cli.redis_server import answers, find_redis_server, redis_arguments, redis_socket_url
from protocol.ids import RequestKey, new_incarnation
from protocol.messages import RunLocal, StepOutputs
from protocol.request import Request
from protocol.sampling import SamplingParams
from services.router.noop_worker import NOOP_LAYOUT
from services.runtime.channel import ControlChannel
from services.runtime.directory import read_records
from services.runtime.peers import ChannelEvent, Identity, Received
from services.runtime.redis_client import open_redis
from services.runtime.redis_keys import RedisKeys

HOST = "127.0.0.1"
START_TIMEOUT_S = 60.0
NUM_LATENCY_REQUESTS = 2000
NUM_CONNECTIONS = 64
NUM_STREAMS = 256
TEXT = "Tell me a short story about a lighthouse keeper, her dog and the last ship of the year."
_numbers = itertools.count()


@dataclass(frozen=True, slots=True)
class Setup:
    port: int
    redis_url: str
    router: psutil.Process


@asynccontextmanager
async def running_router(step_s: float) -> AsyncIterator[Setup]:
    """Redis, a decode worker that makes a token every `step_s`, and a router."""
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "redis.sock"
        redis_url = redis_socket_url(file)
        port = _free_port()
        router = (
            "from services.router.config import RouterConfig;"
            "from services.router.service import run_router;"
            f"run_router(RouterConfig(port={port}, redis_url={redis_url!r},"
            "disable_log_requests=True, log_level='warning'))"
        )
        worker = ("--redis-url", redis_url, "--step-s", str(step_s))
        commands = [
            redis_arguments(find_redis_server(), file),
            (sys.executable, "-m", "services.router.noop_worker", *worker),
            (sys.executable, "-c", router),
        ]
        processes = [
            await asyncio.create_subprocess_exec(*command, stdout=subprocess.DEVNULL)
            for command in commands
        ]
        try:
            async with asyncio.timeout(START_TIMEOUT_S):
                await _until(lambda: answers(redis_url))
                await _until(lambda: _is_healthy(port))
            yield Setup(port, redis_url, psutil.Process(processes[-1].pid))
        finally:
            for process in reversed(processes):
                process.terminate()
                await process.wait()


class Connection:
    """A keep-alive HTTP connection that does no more than it must."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    @classmethod
    async def open(cls, port: int) -> "Connection":
        return cls(*await asyncio.open_connection(HOST, port, limit=2**26))

    def send(self, body: dict[str, Any]) -> None:
        self._writer.write(http_request(body))

    async def read_whole(self) -> bytes:
        head = await self._reader.readuntil(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200"), head
        length = head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0]
        return await self._reader.readexactly(int(length))

    async def read_stream(self) -> bytes:
        """The raw answer up to its end."""
        return await self._reader.readuntil(b"data: [DONE]\n\n\r\n0\r\n\r\n")

    def close(self) -> None:
        self._writer.close()


def chat(max_tokens: int, *, stream: bool = False) -> dict[str, Any]:
    # Nobody has asked it before: what the router remembers of earlier texts is no help.
    messages = [{"role": "user", "content": f"{next(_numbers)}. {TEXT}"}]
    return {"messages": messages, "max_tokens": max_tokens, "stream": stream}


def http_request(body: dict[str, Any]) -> bytes:
    content = json.dumps(body).encode()
    return (
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        b"Content-Length: %d\r\n\r\n%b" % (len(content), content)
    )


def http_latencies_ms(setup: Setup) -> list[float]:
    """Over a blocking socket: an event loop's own time is not the router's."""
    latencies: list[float] = []
    with socket.create_connection((HOST, setup.port)) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for _ in range(NUM_LATENCY_REQUESTS):
            request = http_request(chat(1))
            start_s = time.perf_counter()
            connection.sendall(request)
            answer = connection.recv(1 << 16)
            latencies.append(1000 * (time.perf_counter() - start_s))
            head, _, content = answer.partition(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 200"), head
            json.loads(content)  # it came whole
    return latencies


async def direct_latencies_ms(setup: Setup) -> list[float]:
    """The same number of tokens, asked of the worker without a router."""
    answered = asyncio.Event()

    def on_event(event: ChannelEvent) -> None:
        if isinstance(event, Received) and isinstance(event.message, StepOutputs):
            answered.set()

    channel = ControlChannel(Identity("benchmark", new_incarnation()), on_event)
    async with open_redis(setup.redis_url) as redis:
        [record] = (await read_records(redis, RedisKeys())).values()
    peer = await channel.connected(record.ref)
    latencies: list[float] = []
    for i in range(NUM_LATENCY_REQUESTS):
        request = Request(
            key=RequestKey(f"direct-{i}", 1),
            token_ids=list(range(2 * NOOP_LAYOUT.block_size)),
            num_prompt_tokens=2 * NOOP_LAYOUT.block_size,
            sampling=SamplingParams(max_tokens=1),
        )
        start_s = time.perf_counter()
        peer.send(RunLocal(request))
        await answered.wait()
        answered.clear()
        latencies.append(1000 * (time.perf_counter() - start_s))
    await channel.close()
    return latencies


async def requests_per_s(setup: Setup, *, num_requests: int = 8000) -> dict[str, float]:
    connections = [await Connection.open(setup.port) for _ in range(NUM_CONNECTIONS)]

    async def ask(connection: Connection) -> None:
        for _ in range(num_requests // NUM_CONNECTIONS):
            connection.send(chat(1))
            await connection.read_whole()

    cpu_s, start_s = _cpu_s(setup), time.perf_counter()
    await asyncio.gather(*[ask(connection) for connection in connections])
    wall_s, cpu_s = time.perf_counter() - start_s, _cpu_s(setup) - cpu_s
    for connection in connections:
        connection.close()
    return {
        "requests_per_s": num_requests / wall_s,
        "requests_per_core_s": num_requests / cpu_s,
        "router_cores": cpu_s / wall_s,
    }


async def streamed(setup: Setup, *, num_tokens: int) -> dict[str, float]:
    connections = [await Connection.open(setup.port) for _ in range(NUM_STREAMS)]
    cpu_s, start_s = _cpu_s(setup), time.perf_counter()
    for connection in connections:
        connection.send(chat(num_tokens, stream=True))
    answers = await asyncio.gather(*[connection.read_stream() for connection in connections])
    wall_s, cpu_s = time.perf_counter() - start_s, _cpu_s(setup) - cpu_s
    for connection in connections:
        connection.close()
    total = NUM_STREAMS * num_tokens
    # Less each stream's opening and closing event.
    num_events = sum(answer.count(b"data: ") - 2 for answer in answers)
    return {
        "tokens_per_s": total / wall_s,
        "tokens_per_core_s": total / cpu_s,
        "tokens_per_event": total / num_events,
        "router_cores": cpu_s / wall_s,
    }


async def measure() -> dict[str, Any]:
    async with running_router(step_s=0.0) as setup:
        http_latencies_ms(setup)  # warm
        direct, http = await direct_latencies_ms(setup), http_latencies_ms(setup)
        rates = await requests_per_s(setup)
        flat_out = await streamed(setup, num_tokens=500)
    async with running_router(step_s=0.02) as setup:
        paced = await streamed(setup, num_tokens=500)
    return {
        "added_p50_ms": median(http) - median(direct),
        "http_ms": _percentiles(http),
        "direct_ms": _percentiles(direct),
        "non_stream_64_connections": rates,
        "stream_256_paced": paced,
        "stream_256_flat_out": flat_out,
    }


def _percentiles(values: list[float]) -> dict[str, float]:
    cuts = quantiles(values, n=100)
    return {"p50": cuts[49], "p90": cuts[89], "p99": cuts[98]}


def _cpu_s(setup: Setup) -> float:
    times = setup.router.cpu_times()
    return times.user + times.system


async def _until(condition: Callable[[], Awaitable[bool]]) -> None:
    while not await condition():  # noqa: ASYNC110  (another process has no event for us)
        await asyncio.sleep(0.05)


async def _is_healthy(port: int) -> bool:
    try:
        reader, writer = await asyncio.open_connection(HOST, port)
    except OSError:
        return False
    writer.write(b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
    status = await reader.readline()
    writer.close()
    return b" 200 " in status


def _free_port() -> int:
    with socket.create_server((HOST, 0)) as server:
        return int(server.getsockname()[1])


def _commit() -> str:
    git = ("git", "rev-parse", "--short", "HEAD")
    return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description="What a router costs.")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/router.json"))
    arguments = parser.parse_args()
    result = {
        "commit": _commit(),
        "date": time.strftime("%Y-%m-%d"),
        "cores": psutil.cpu_count(),
        "python": platform.python_version(),
        "load_average_before": psutil.getloadavg()[0],
        **uvloop.run(measure()),
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(result, indent=2) + "\n")
    sys.stdout.write(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
