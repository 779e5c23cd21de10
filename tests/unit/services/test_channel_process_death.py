"""Control channels whose peers die: real processes."""

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
from channel_stack import Stack

from protocol.ids import WorkerRef
from services.runtime.peers import (
    LostReason,
)


@pytest.fixture
async def stack() -> AsyncIterator[Stack]:
    async with Stack() as stack:
        yield stack


PEER_PROCESS = """
import asyncio, sys
from protocol.ids import WorkerRef
from services.runtime.channel import ControlChannel
from services.runtime.peers import Identity

async def main():
    channel = ControlChannel(Identity(sys.argv[1], 7), lambda event: None)
    if sys.argv[2] == "listen":
        print(channel.listen("tcp://127.0.0.1:0"), flush=True)
    else:
        await channel.connected(WorkerRef("decode-0", 7, sys.argv[2]))
        print("connected", flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""


@pytest.fixture
async def start_peer() -> AsyncIterator[Callable[..., subprocess.Popen[str]]]:
    started: list[subprocess.Popen[str]] = []

    def start(*arguments: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", PEER_PROCESS, *arguments],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])},
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


async def first_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return (await asyncio.to_thread(process.stdout.readline)).strip()


# The heartbeat limits are out of reach here, so only the closed connection can tell.
NO_TIMEOUTS = {"lost_after_s": 1000.0, "transport_timeout_s": 1000.0}


async def test_kill_9_of_a_worker_is_a_disconnect(stack: Stack, start_peer) -> None:
    process = start_peer("decode-0", "listen")
    ref = WorkerRef("decode-0", 7, await first_line(process))
    router = stack.end("router-a", **NO_TIMEOUTS)
    await router.channel.connected(ref)
    process.send_signal(signal.SIGKILL)
    assert (await router.events.down()).reason is LostReason.DISCONNECTED


async def test_kill_9_of_a_router_is_a_disconnect(stack: Stack, start_peer) -> None:
    worker, ref = stack.worker(**NO_TIMEOUTS)
    process = start_peer("router-a", ref.control_address)
    assert await first_line(process) == "connected"
    await worker.events.up()
    process.send_signal(signal.SIGKILL)
    assert (await worker.events.down()).reason is LostReason.DISCONNECTED


async def test_a_stopped_process_is_lost_by_the_transport(stack: Stack, start_peer) -> None:
    process = start_peer("decode-0", "listen")
    ref = WorkerRef("decode-0", 7, await first_line(process))
    router = stack.end("router-a", lost_after_s=1000.0, transport_timeout_s=0.5)
    await router.channel.connected(ref)
    process.send_signal(signal.SIGSTOP)
    assert (await router.events.down()).reason is LostReason.DISCONNECTED
