"""What the control plane costs: messages through a channel, index lookups, placement decisions.

    python -m benchmarks.cpu.control_plane [--output benchmarks/results/control-plane.json]

`channel`: two processes over TCP, small messages one way, and one message there and back. One
process's Python is the limit, so its share of a core is reported beside the rate.
"""

import argparse
import asyncio
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import uvloop

from protocol.ids import RequestKey, WorkerRef
from protocol.messages import AbortRequest, ControlMessage, StepOutputs
from protocol.request import SequenceOutput
from services.router.placement.candidates import (
    DecodeCandidate,
    LineRates,
    PlacementPolicy,
    PrefillCandidate,
    RequestFacts,
)
from services.router.placement.index import PrefixIndex
from services.router.placement.placement import place
from services.runtime.channel import ControlChannel
from services.runtime.peers import ChannelEvent, Identity, Received

SEED = 0
NUM_MESSAGES = 200_000
# Sent without a word from the other side, as a worker's steps are; far below the queue's bound.
WINDOW = 4_000
NUM_ROUND_TRIPS = 2_000
NUM_SEQUENCES = 64
ECHO = AbortRequest(RequestKey("echo", 0))
WORKER_ID = "echo"


class Echo:
    """The other process: answers every `WINDOW`th message, and every `ECHO`."""

    def __init__(self) -> None:
        self._num_received = 0

    def __call__(self, event: ChannelEvent) -> None:
        match event:
            case Received(peer, message):
                self._num_received += 1
                if message == ECHO or self._num_received % WINDOW == 0:
                    peer.send(ECHO)
            case _:
                self._num_received = 0


async def run_echo() -> None:
    channel = ControlChannel(Identity(WORKER_ID, 1), Echo())
    print(channel.listen("tcp://127.0.0.1:0"), flush=True)
    await asyncio.to_thread(sys.stdin.read)
    await channel.close()


async def time_channel(address: str) -> dict[str, float]:
    answered = asyncio.Event()

    def on_event(event: ChannelEvent) -> None:
        if isinstance(event, Received):
            answered.set()

    channel = ControlChannel(Identity("client", 1), on_event)
    peer = await channel.connected(WorkerRef(WORKER_ID, 1, address))

    async def send(message: ControlMessage, count: int) -> float:
        started_s = time.perf_counter()
        for start in range(0, count, WINDOW):
            for _ in range(min(WINDOW, count - start)):
                peer.send(message)
            await answered.wait()
            answered.clear()
        return count / (time.perf_counter() - started_s)

    small = AbortRequest(RequestKey("0" * 32, 0))
    step = StepOutputs(
        [SequenceOutput(RequestKey(f"{i:032}", 0), 100, [1234]) for i in range(NUM_SEQUENCES)]
    )
    used_s = time.process_time()
    started_s = time.perf_counter()
    small_per_s = await send(small, NUM_MESSAGES)
    share = (time.process_time() - used_s) / (time.perf_counter() - started_s)
    steps_per_s = await send(step, NUM_MESSAGES // 10)
    trips_us: list[float] = []
    for _ in range(NUM_ROUND_TRIPS):
        started_s = time.perf_counter()
        peer.send(ECHO)
        await answered.wait()
        answered.clear()
        trips_us.append(1e6 * (time.perf_counter() - started_s))
    await channel.close()
    return {
        "small_messages_per_s": round(small_per_s),
        "sender_cores": round(share, 2),
        "steps_of_64_sequences_per_s": round(steps_per_s),
        "round_trip_p50_us": round(statistics.median(trips_us), 1),
        "round_trip_p99_us": round(statistics.quantiles(trips_us, n=100)[98], 1),
    }


def measure_channel() -> dict[str, float]:
    with subprocess.Popen(
        [sys.executable, "-m", "benchmarks.cpu.control_plane", "--echo"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        figures = uvloop.run(time_channel(process.stdout.readline().strip()))
        process.communicate()
    return figures


def time_calls(call: Callable[[int], object], repeats: int) -> dict[str, float]:
    """Microseconds; `call` gets the number of the repetition."""
    times_us: list[float] = []
    for number in range(repeats):
        started_s = time.perf_counter()
        call(number)
        times_us.append(1e6 * (time.perf_counter() - started_s))
    return {
        "p50_us": round(statistics.median(times_us), 1),
        "p99_us": round(statistics.quantiles(times_us, n=100)[98], 1),
    }


def measure_index(num_blocks: int, num_workers: int) -> dict[str, float]:
    """Worker n of N has the first n/N of the prompt, so one drops out at every turn."""
    rng = random.Random(SEED)
    prompt = [rng.randbytes(16) for _ in range(num_blocks)]
    index = PrefixIndex()
    for worker in range(num_workers):
        held = prompt[: num_blocks * (worker + 1) // num_workers]
        index.resync(f"worker-{worker}", 1, sequence=0, hashes=set(held))
    return time_calls(lambda _: index.match(prompt), 200)


def measure_placement(num_prefill: int, num_decode: int) -> dict[str, float]:
    rng = random.Random(SEED)
    decode = [
        DecodeCandidate(
            worker_id=f"decode-{i}",
            num_blocks=40_000,
            num_free_blocks=rng.randrange(20_000),
            token_bytes=131_072,
            num_cached_tokens=rng.choice((0, 0, 1024)),
            num_running=rng.randrange(1, 256),
            ms_per_token=0.025,
            ms_per_step=rng.uniform(7.0, 20.0),
        )
        for i in range(num_decode)
    ]
    prefill = [
        PrefillCandidate(
            worker_id=f"prefill-{i}",
            num_cached_tokens=rng.choice((0, 0, 1024)),
            num_queued_tokens=rng.randrange(20_000),
            ms_per_token=0.025,
            line_rates=LineRates.of({d.worker_id: rng.uniform(10.0, 40.0) for d in decode}),
        )
        for i in range(num_prefill)
    ]
    policy = PlacementPolicy()
    return time_calls(
        lambda number: place(RequestFacts(4096, 256, number), prefill, decode, policy), 200
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--echo", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.echo:
        uvloop.run(run_echo())
        return
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    )
    report = {
        "commit": commit.stdout.strip(),
        "python": platform.python_version(),
        "cpus": os.cpu_count(),
        "seed": SEED,
        "channel": measure_channel(),
        "index_match": {
            f"{num_blocks} blocks, {num_workers} workers": measure_index(num_blocks, num_workers)
            for num_blocks, num_workers in ((100, 8), (1_000, 8), (10_000, 8), (10_000, 100))
        },
        "place": {
            f"{num_prefill} prefill, {num_decode} decode": measure_placement(
                num_prefill, num_decode
            )
            for num_prefill, num_decode in ((1, 1), (4, 4), (50, 50), (500, 500))
        },
    }
    text = json.dumps(report, indent=2)
    print(text)
    if arguments.output is not None:
        arguments.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
