"""KV transfer between two processes on one GPU, or two: 512 MiB through `Connection.write`.

    python -m benchmarks.gpu.transfer --output benchmarks/results/transfer-gpu.json
    python -m benchmarks.gpu.transfer --receiver-card 1     # where there are two

Every figure is acknowledged by the receiver, all copies included, in 10⁹ bytes a second.
"contiguous" goes from the pool as it lies, "scattered" from random to random blocks. "read": the
receiver maps the sender's pool and copies, as workers of one host do. "put": UCX messages from
staging memory to staging memory, as between hosts. Beside them: what gathering and scattering
alone reach, and a plain copy on the device; with the receiver on another card, one to that card,
which is the limit.
"""

import argparse
import asyncio
import functools
import importlib.metadata
import json
import multiprocessing
import random
import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from multiprocessing.connection import Connection as Pipe
from pathlib import Path

import torch

from engine.device_blocks import DeviceBlocks, Run
from kvtransfer import DeviceRegion, TransferAgent, TransferConfig
from kvtransfer.ucx import DEVICE_MEMORY_SETTINGS, UcxTransport

KIB, MIB = 1 << 10, 1 << 20
POOL_BYTES = 1024 * MIB
WRITE_BYTES = 512 * MIB
SENDER, RECEIVER = 1, 2


@dataclass(frozen=True)
class Case:
    """One line of the result."""

    scheme: str
    layout: str
    block_bytes: int
    message_bytes: int
    write_bytes: int = WRITE_BYTES

    @property
    def num_blocks(self) -> int:
        return self.write_bytes // self.block_bytes

    @property
    def config(self) -> TransferConfig:
        return TransferConfig(
            max_message_bytes=self.message_bytes,
            window_bytes=4 * self.message_bytes,
            gather_below_bytes=self.message_bytes,
            gathered_message_bytes=self.message_bytes,
            read_peers_pools=self.scheme == "read",
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
    # A 16-token block of Llama-3.1-8B has 2 MiB in bfloat16, one of SmolLM2-135M 360 KiB.
    reads = [
        Case("read", layout, block_bytes, 64 * MIB)
        for layout, block_bytes in (
            ("contiguous", 2 * MIB),
            ("scattered", 2 * MIB),
            ("scattered", 256 * KIB),
            ("scattered", 64 * KIB),
        )
    ]
    puts = [
        Case("put", layout, block_bytes, size * MIB)
        for layout, block_bytes in (("contiguous", 2 * MIB), ("scattered", 2 * MIB))
        for size in (8, 64)
    ]
    small = Case("read", "contiguous", 2 * MIB, 64 * MIB, write_bytes=2 * MIB)
    puts.append(Case("put", "scattered", 256 * KIB, 64 * MIB))
    return [*reads, small, *puts]


def open_agent(case: Case, pool: torch.Tensor, incarnation: int) -> TransferAgent:
    blocks = pool.view(POOL_BYTES // case.block_bytes, case.block_bytes)
    agent = TransferAgent(
        UcxTransport(DEVICE_MEMORY_SETTINGS, peers_write=True, spin_s=0.001),
        DeviceRegion(DeviceBlocks(blocks), num_blocks=len(blocks), block_bytes=case.block_bytes),
        worker_id=f"worker-{incarnation}",
        incarnation=incarnation,
        on_write=lambda _: None,
        config=case.config,
    )
    agent.start()
    return agent


async def receive_case(pipe: Pipe, case: Case, pool: torch.Tensor) -> bool:
    """The receiving process's part of a case; whether the right bytes arrived."""
    pool.zero_()
    torch.cuda.synchronize()
    agent = open_agent(case, pool, RECEIVER)
    await agent.connect(pipe.recv())
    src, dst = case.places
    agent.expect(1, attempt=0, sender_incarnation=SENDER, block_ids=dst)
    pipe.send(agent.metadata())
    finished = asyncio.Event()
    asyncio.get_running_loop().add_reader(pipe.fileno(), finished.set)
    await finished.wait()
    pipe.recv()
    await agent.close()
    expected = payload().view(-1, case.block_bytes)[src]
    return torch.equal(pool.view(-1, case.block_bytes)[dst], expected)


def receive_all(pipe: Pipe, card: int) -> None:
    torch.cuda.set_device(card)
    pool = torch.empty(POOL_BYTES, dtype=torch.uint8, device="cuda")
    for case in cases():
        pipe.send(asyncio.run(receive_case(pipe, case, pool)))


def payload() -> torch.Tensor:
    """The sender's pool, which the receiver can make for itself."""
    generator = torch.Generator("cuda").manual_seed(0)
    return torch.randint(
        0, 256, (POOL_BYTES,), dtype=torch.uint8, device="cuda", generator=generator
    )


async def send_case(pipe: Pipe, case: Case, pool: torch.Tensor, rounds: int) -> list[float]:
    """Seconds of each round, after one that warms the way."""
    agent = open_agent(case, pool, SENDER)
    pipe.send(agent.metadata())
    connection = await agent.connect(pipe.recv())
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


def median_gb_per_s(copy: Callable[[], object], rounds: int) -> float:
    """Of `WRITE_BYTES` copied."""
    seconds: list[float] = []
    for _ in range(rounds + 1):
        torch.cuda.synchronize()
        start = time.perf_counter()
        copy()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return WRITE_BYTES / sorted(seconds[1:])[rounds // 2] / 1e9


def local_copies(pool: torch.Tensor, rounds: int) -> dict[str, float]:
    """GB/s of copies within this process, counting each byte once."""
    staging_bytes = 64 * MIB
    result = {
        "device_copy": median_gb_per_s(lambda: pool[:WRITE_BYTES].copy_(pool[WRITE_BYTES:]), rounds)
    }
    for block_bytes in (2 * MIB, 256 * KIB, 64 * KIB):
        blocks = DeviceBlocks(pool.view(-1, block_bytes))
        staging = blocks.allocate(staging_bytes)
        count = staging_bytes // block_bytes
        ids = random.Random(0).sample(range(POOL_BYTES // block_bytes), WRITE_BYTES // block_bytes)
        runs = [(block_id, 1) for block_id in ids]
        pieces = [runs[at : at + count] for at in range(0, len(runs), count)]

        def copy_all(copy: Callable[[list[Run]], None], pieces: list[list[Run]] = pieces) -> None:
            for piece in pieces:
                copy(piece)

        for name, copy in (("gather", staging.gather), ("scatter", staging.scatter)):
            rate = median_gb_per_s(functools.partial(copy_all, copy), rounds)
            result[f"{name}_{block_bytes // KIB}_kib"] = rate
    return {name: round(rate, 1) for name, rate in result.items()}


def head_commit() -> str:
    command = ["git", "rev-parse", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def environment(commit: str | None) -> dict[str, object]:
    return {
        "commit": commit or head_commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "card": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "ucxx": importlib.metadata.version("ucxx-cu13"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--commit", help="what was measured, where there is no git")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--receiver-card", type=int, default=0, help="the sender has card 0")
    arguments = parser.parse_args()

    card = arguments.receiver_card
    result = environment(arguments.commit) | {"receiver_card": card}
    result["local_gb_per_s"] = local_copies(
        torch.empty(POOL_BYTES, dtype=torch.uint8, device="cuda"), arguments.rounds
    )
    pool = payload()
    if card:
        there = torch.empty(WRITE_BYTES, dtype=torch.uint8, device=f"cuda:{card}")
        result["copy_to_card_gb_per_s"] = round(
            median_gb_per_s(lambda: there.copy_(pool[:WRITE_BYTES]), arguments.rounds), 1
        )
        del there
    print(result, flush=True)
    torch.cuda.synchronize()
    ours, theirs = multiprocessing.get_context("spawn").Pipe()
    receiver = multiprocessing.get_context("spawn").Process(target=receive_all, args=(theirs, card))
    receiver.start()
    lines: list[dict[str, object]] = []
    for case in cases():
        seconds = sorted(asyncio.run(send_case(ours, case, pool, arguments.rounds)))
        if not ours.recv():
            raise SystemExit(f"{case}: wrong bytes arrived")
        best, median = (
            case.write_bytes / s / 1e9 for s in (seconds[0], seconds[len(seconds) // 2])
        )
        lines.append(
            asdict(case) | {"gb_per_s": round(best, 1), "median_gb_per_s": round(median, 1)}
        )
        print(
            f"{case.scheme:>5} {case.write_bytes // MIB:>4} MiB, {case.layout:>10} blocks of "
            f"{case.block_bytes // KIB:>5} KiB, messages of {case.message_bytes // MIB:>3} MiB: "
            f"best {best:6.1f}, median {median:6.1f} GB/s",
            flush=True,
        )
    receiver.join()
    result["results"] = lines
    if arguments.output is not None:
        arguments.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
