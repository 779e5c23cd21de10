"""What it costs to tell a peer on one card which blocks to read: 512 MiB, two processes, no card.

    python -m benchmarks.transfer.announcements --against /path/to/another/checkout

Everything from `Connection.write` to the receiver's answer is real but the copies: those take the
processor for `LAUNCH_S`, and are done as a card at `CARD_GB_PER_S` would be. `--against` names
another checkout, which is measured in turns with this one. In microseconds.
"""

import argparse
import asyncio
import json
import multiprocessing
import os
import platform
import random
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from multiprocessing.connection import Connection as Pipe
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from kvtransfer import KVRegion, TransferAgent, TransferConfig
from kvtransfer.ucx import DEVICE_MEMORY_SETTINGS, UcxTransport

KIB, MIB = 1 << 10, 1 << 20
WRITE_BYTES = 512 * MIB
CARD_GB_PER_S = 1240.0
LAUNCH_S = 100e-6
SENDER, RECEIVER = 1, 2


@dataclass(frozen=True)
class Case:
    """One line of the result. `block_bytes` are those of the card that is imagined."""

    block_bytes: int

    @property
    def num_blocks(self) -> int:
        return WRITE_BYTES // self.block_bytes

    @property
    def places(self) -> tuple[list[int], list[int]]:
        """Source and target blocks."""
        pool = range(2 * self.num_blocks)
        generator = random.Random(0)
        return generator.sample(pool, self.num_blocks), generator.sample(pool, self.num_blocks)


CASES = [Case(size) for size in (64 * KIB, 256 * KIB, 2 * MIB, WRITE_BYTES)]


class ImaginedRegion(KVRegion):
    """A byte of host memory stands for each block; peers may map it."""

    def __init__(self, case: Case) -> None:
        num_blocks = 2 * case.num_blocks
        super().__init__(memoryview(bytearray(num_blocks)), num_blocks=num_blocks, block_bytes=1)
        self._copy_s = case.block_bytes / CARD_GB_PER_S / 1e9

    def export(self) -> bytes:
        return b"imagined"

    def map(self, exported: bytes) -> "ImaginedPool":
        del exported
        return ImaginedPool(self.num_blocks, self._copy_s)


class ImaginedPool:
    """Its copies follow each other; each block takes `copy_s`."""

    def __init__(self, num_blocks: int, copy_s: float) -> None:
        self.num_blocks = num_blocks
        self._copy_s = copy_s
        self._end_s = 0.0

    def start_copy(
        self, source_ids: NDArray[np.uint32], target_ids: NDArray[np.uint32]
    ) -> "ImaginedCopy":
        assert len(source_ids) == len(target_ids)
        launched_s = time.perf_counter() + LAUNCH_S
        while time.perf_counter() < launched_s:
            pass
        self._end_s = max(launched_s, self._end_s) + len(source_ids) * self._copy_s
        return ImaginedCopy(self._end_s)

    def start_trial(self, num_blocks: int) -> "ImaginedCopy":
        return ImaginedCopy(time.perf_counter() + num_blocks * self._copy_s)

    def close(self) -> None:
        """There is nothing to unmap."""


@dataclass(frozen=True)
class ImaginedCopy:
    end_s: float

    @property
    def is_done(self) -> bool:
        return time.perf_counter() >= self.end_s

    def wait(self) -> None:
        while not self.is_done:
            pass


def open_agent(case: Case, incarnation: int) -> TransferAgent:
    agent = TransferAgent(
        UcxTransport(DEVICE_MEMORY_SETTINGS, peers_write=True, spin_s=0.001),
        ImaginedRegion(case),
        worker_id=f"worker-{incarnation}",
        incarnation=incarnation,
        on_write=lambda _: None,
        config=TransferConfig.for_device_memory(),
    )
    agent.start()
    return agent


async def receive_case(pipe: Pipe, case: Case) -> None:
    """The receiving process's part of a case."""
    agent = open_agent(case, RECEIVER)
    await agent.connect(pipe.recv())
    agent.expect(1, attempt=0, sender_incarnation=SENDER, block_ids=case.places[1])
    pipe.send(agent.metadata())
    finished = asyncio.Event()
    asyncio.get_running_loop().add_reader(pipe.fileno(), finished.set)
    await finished.wait()
    pipe.recv()
    await agent.close()


def receive_all(pipe: Pipe) -> None:
    for case in CASES:
        asyncio.run(receive_case(pipe, case))


async def send_case(pipe: Pipe, case: Case, rounds: int) -> list[float]:
    """Seconds of each round, after some that warm the way."""
    agent = open_agent(case, SENDER)
    pipe.send(agent.metadata())
    connection = await agent.connect(pipe.recv())
    src, dst = case.places
    seconds: list[float] = []
    for write_seq in range(rounds + 3):
        start = time.perf_counter()
        await connection.write(
            ticket_id=1,
            attempt=0,
            receiver_incarnation=RECEIVER,
            src_blocks=src,
            dst_blocks=dst,
            write_seq=write_seq,
        )
        seconds.append(time.perf_counter() - start)
    pipe.send("finished")
    await agent.close()
    return seconds[3:]


def measure(rounds: int) -> list[list[float]]:
    """Seconds of each case's rounds."""
    ours, theirs = multiprocessing.get_context("spawn").Pipe()
    receiver = multiprocessing.get_context("spawn").Process(target=receive_all, args=(theirs,))
    receiver.start()
    seconds = [asyncio.run(send_case(ours, case, rounds)) for case in CASES]
    receiver.join()
    return seconds


def measure_in(checkout: Path, rounds: int) -> list[list[float]]:
    """`measure` by this file with the packages of a checkout."""
    done = subprocess.run(
        [sys.executable, __file__, "--raw", "--rounds", str(rounds)],
        cwd=checkout,
        env=os.environ | {"PYTHONPATH": "."},
        stdout=subprocess.PIPE,
        check=True,
    )
    return msgspec.json.decode(done.stdout, type=list[list[float]])


def line(case: Case, checkout: str, seconds: list[float]) -> dict[str, object]:
    microseconds = sorted(1e6 * s for s in seconds)
    at = {"best": 0, "tenth": len(seconds) // 10, "median": len(seconds) // 2}
    return asdict(case) | {
        "num_blocks": case.num_blocks,
        "checkout": checkout,
        **{f"{name}_us": round(microseconds[i]) for name, i in at.items()},
    }


def head_commit(checkout: Path) -> str:
    command = ["git", "rev-parse", "HEAD"]
    return subprocess.run(
        command, cwd=checkout, capture_output=True, text=True, check=False
    ).stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description="What announcing blocks costs")
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--against", type=Path, help="another checkout")
    parser.add_argument("--raw", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    if arguments.raw:
        print(json.dumps(measure(arguments.rounds)))
        return
    checkouts = {"this": Path.cwd()}
    if arguments.against is not None:
        checkouts["other"] = arguments.against
    turns = [
        {name: measure_in(path, arguments.rounds) for name, path in checkouts.items()}
        for _ in range(arguments.turns)
    ]
    lines = [
        line(case, name, [second for turn in turns for second in turn[name][at]])
        for at, case in enumerate(CASES)
        for name in checkouts
    ]
    for result in lines:
        print(result)
    if arguments.output is not None:
        environment = {
            "commits": {name: head_commit(path) for name, path in checkouts.items()},
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "processors": os.cpu_count(),
            "python": platform.python_version(),
            "card_gb_per_s": CARD_GB_PER_S,
            "launch_us": 1e6 * LAUNCH_S,
            "results": lines,
        }
        arguments.output.write_text(json.dumps(environment, indent=2) + "\n")


if __name__ == "__main__":
    main()
