"""KV transfer between two processes of one host, beside one memcpy thread in the same run.

    python -m benchmarks.transfer.host --output benchmarks/results/transfer-host.json

Every figure is the best of `--rounds` writes through `Connection.write`, acknowledged by the
receiver, in 10⁹ bytes a second. "contiguous" writes 64 MiB (or one message, if larger) cut into
messages of the given size; "scattered" writes blocks of the given size from random to random
places, once as one message each and once gathered through staging buffers.
"""

import argparse
import asyncio
import ctypes
import importlib.metadata
import json
import mmap
import multiprocessing
import os
import platform
import random
import subprocess
import time
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from multiprocessing.connection import Connection as Pipe
from pathlib import Path

from kvtransfer import Connection, KVRegion, TransferAgent, TransferConfig
from kvtransfer.ucx import UcxTransport

KIB, MIB = 1 << 10, 1 << 20
POOL_BYTES = 256 * MIB
WRITE_BYTES = 64 * MIB
MESSAGE_SIZES = (64 * KIB, 256 * KIB, MIB, 4 * MIB, 16 * MIB, 64 * MIB)
# 368,640 bytes: a block of SmolLM2-135M in bfloat16, 30 layers × 2 × 3 heads × 16 tokens × 64 × 2.
SCATTERED_BLOCKS = (16 * KIB, 64 * KIB, 128 * KIB, 368_640, 2 * MIB)
SENDER, RECEIVER = 1, 2


@dataclass(frozen=True)
class Case:
    """One line of the result."""

    layout: str
    block_bytes: int
    message_bytes: int
    is_gathered: bool
    num_blocks: int

    @property
    def config(self) -> TransferConfig:
        return TransferConfig(
            max_message_bytes=self.message_bytes,
            window_bytes=max(2 * self.message_bytes, TransferConfig().window_bytes),
            gather_below_bytes=self.block_bytes + 1 if self.is_gathered else 1,
            gathered_message_bytes=self.message_bytes,
        )

    @property
    def places(self) -> tuple[list[int], list[int]]:
        """Source and target blocks."""
        if self.layout == "contiguous":
            blocks = list(range(self.num_blocks))
            return blocks, blocks
        pool = range(POOL_BYTES // self.block_bytes)
        generator = random.Random(0)
        return generator.sample(pool, self.num_blocks), generator.sample(pool, self.num_blocks)


def cases() -> list[Case]:
    contiguous = [
        Case("contiguous", size, size, is_gathered=False, num_blocks=max(1, WRITE_BYTES // size))
        for size in MESSAGE_SIZES
    ]
    direct = [
        Case("scattered", size, size, is_gathered=False, num_blocks=WRITE_BYTES // size)
        for size in SCATTERED_BLOCKS
    ]
    gathered = [
        replace(case, is_gathered=True, message_bytes=max(MIB, 2 * case.block_bytes))
        for case in direct
    ]
    return [*contiguous, *direct, *gathered]


def pool_memory() -> memoryview:
    """Touched anonymous memory, in huge pages where the kernel has them."""
    memory = mmap.mmap(-1, POOL_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    view = memoryview(memory)
    ctypes.memset(ctypes.addressof(ctypes.c_char.from_buffer(view)), 1, POOL_BYTES)
    return view


def open_agent(case: Case, pool: memoryview, incarnation: int) -> TransferAgent:
    num_blocks = POOL_BYTES // case.block_bytes
    agent = TransferAgent(
        UcxTransport(),
        KVRegion(
            pool[: num_blocks * case.block_bytes],
            num_blocks=num_blocks,
            block_bytes=case.block_bytes,
        ),
        worker_id=f"worker-{incarnation}",
        incarnation=incarnation,
        on_write=lambda _: None,
        config=case.config,
    )
    agent.start()
    return agent


async def receive_case(pipe: Pipe, case: Case, pool: memoryview) -> None:
    """The receiving process's part of a case."""
    agent = open_agent(case, pool, RECEIVER)
    await agent.connect(pipe.recv())
    agent.expect(1, attempt=0, sender_incarnation=SENDER, block_ids=case.places[1])
    pipe.send(agent.metadata())
    finished = asyncio.Event()
    asyncio.get_running_loop().add_reader(pipe.fileno(), finished.set)
    await finished.wait()
    pipe.recv()
    await agent.close()


def receive_all(pipe: Pipe) -> None:
    pool = pool_memory()
    for case in cases():
        asyncio.run(receive_case(pipe, case, pool))


async def send_case(pipe: Pipe, case: Case, pool: memoryview, rounds: int) -> list[float]:
    """Seconds of each round, after one that warms the memory."""
    agent = open_agent(case, pool, SENDER)
    pipe.send(agent.metadata())
    connection: Connection = await agent.connect(pipe.recv())
    src, dst = case.places
    seconds: list[float] = []
    for write_seq in range(rounds + 1):
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
    return seconds[1:]


def memcpy_gb_per_s(pool: memoryview, rounds: int) -> float:
    """One thread copying 64 MiB inside the pool."""
    source, target = pool[:WRITE_BYTES], pool[WRITE_BYTES : 2 * WRITE_BYTES]
    best_s = float("inf")
    for _ in range(rounds + 1):
        start = time.perf_counter()
        target[:] = source
        best_s = min(best_s, time.perf_counter() - start)
    return WRITE_BYTES / best_s / 1e9


def environment() -> dict[str, object]:
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    cpus = [
        line.split(":", 1)[1].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    return {
        "commit": commit,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": cpus[0] if cpus else platform.processor(),
        "num_cpus": os.cpu_count(),
        "kernel": platform.release(),
        "ucxx": importlib.metadata.version("ucxx-cu13"),
        "load_average_before": os.getloadavg()[0],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()

    result = environment()
    pool = pool_memory()
    ours, theirs = multiprocessing.get_context("spawn").Pipe()
    receiver = multiprocessing.get_context("spawn").Process(target=receive_all, args=(theirs,))
    receiver.start()
    lines: list[dict[str, object]] = []
    for case in cases():
        memcpy = memcpy_gb_per_s(pool, arguments.rounds)
        seconds = asyncio.run(send_case(ours, case, pool, arguments.rounds))
        num_bytes = case.num_blocks * case.block_bytes
        gb_per_s = num_bytes / min(seconds) / 1e9
        lines.append(
            asdict(case)
            | {
                "gb_per_s": round(gb_per_s, 2),
                "median_gb_per_s": round(num_bytes / sorted(seconds)[len(seconds) // 2] / 1e9, 2),
                "memcpy_gb_per_s": round(memcpy, 2),
                "share_of_memcpy": round(gb_per_s / memcpy, 2),
            }
        )
        kind = "gathered" if case.is_gathered else case.layout
        print(
            f"{kind:>10} {case.block_bytes // KIB:>6} KiB  {gb_per_s:6.2f} GB/s  "
            f"memcpy {memcpy:6.2f}  {gb_per_s / memcpy:5.2f}×",
            flush=True,
        )
    receiver.join()
    result["load_average_after"] = os.getloadavg()[0]
    result["results"] = lines
    if arguments.output is not None:
        arguments.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
