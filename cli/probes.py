"""Tells whether a process of the stack is ready, as anyone could see it from outside."""

import asyncio
from collections.abc import Awaitable, Callable

from cli.redis_server import answers
from cli.registered_workers import RegisteredWorkers

_TIMEOUT_S = 2.0

Probe = Callable[[int], Awaitable[bool]]


def redis_probe(url: str) -> Probe:
    """Ready when it answers."""

    async def is_ready(_pid: int) -> bool:
        return await answers(url)

    return is_ready


def worker_probe(workers: RegisteredWorkers, worker_id: str) -> Probe:
    """Ready when the process `pid` has registered as `worker_id`."""

    async def is_ready(pid: int) -> bool:
        record = await workers.record(worker_id)
        return record is not None and record.pid == pid

    return is_ready


def router_probe(host: str, port: int) -> Probe:
    """Ready when `/health` says that a request would be served."""

    async def is_ready(_pid: int) -> bool:
        try:
            async with asyncio.timeout(_TIMEOUT_S):
                return await http_status(host, port, "/health") == 200
        except (OSError, TimeoutError, ValueError, IndexError):
            # Not up yet, or not speaking HTTP yet.
            return False

    return is_ready


async def http_status(host: str, port: int, path: str) -> int:
    """The status of a GET; OSError or ValueError if there is no HTTP server."""
    reader, writer = await asyncio.open_connection(host.strip("[]"), port)
    try:
        request = f"GET {path} HTTP/1.1\r\nHost: {host}:{port}\r\nConnection: close\r\n\r\n"
        writer.write(request.encode())
        return int((await reader.readline()).split()[1])
    finally:
        writer.close()
