"""Time of the schedulers' own Python, and what the prompt policy does to waiting times.

    python -m benchmarks.cpu.scheduler [--output benchmarks/results/scheduler.json]

No model runs: `step` times schedule + commit alone; `policy` counts in steps, with every step
taking the time of its tokens, and compares with first-come-first-served.
"""

import argparse
import json
import platform
import random
import statistics
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

from engine.block_pool import BlockPool
from engine.scheduler.config import SchedulerConfig
from engine.scheduler.decode import DecodeScheduler
from engine.scheduler.prefill import PrefillScheduler
from engine.sequence import Sequence
from protocol.block_hash import root_hash
from protocol.ids import RequestKey
from protocol.request import Request
from protocol.sampling import SamplingParams

BLOCK_SIZE = 16
ROOT = root_hash("benchmark")
NUM_STEPS = 400
# What a simulated step costs beside its tokens.
STEP_OVERHEAD_S = 0.001


def make_sequence(name: str, token_ids: list[int], max_tokens: int, arrival_s: float) -> Sequence:
    request = Request(
        key=RequestKey(name, 0),
        token_ids=token_ids,
        num_prompt_tokens=len(token_ids),
        sampling=SamplingParams(max_tokens=max_tokens, stop_token_ids=(5,)),
    )
    return Sequence(request, ROOT, arrival_s)


def time_decode_steps(num_seqs: int, num_blocks: int, seed: int) -> dict[str, float]:
    """Milliseconds of schedule + commit while `num_seqs` sequences decode."""
    rng = random.Random(seed)
    pool = BlockPool(num_blocks, BLOCK_SIZE)
    config = SchedulerConfig(
        max_num_seqs=num_seqs,
        max_num_batched_tokens=8192,
        max_model_len=8192,
        eos_token_ids=frozenset({2}),
    )
    scheduler = DecodeScheduler(pool, config)
    for i in range(num_seqs):
        prompt = [rng.randrange(10, 50_000) for _ in range(1000 + i % BLOCK_SIZE)]
        scheduler.add(make_sequence(str(i), prompt, 4096, float(i)))
    durations_ms: list[float] = []
    while len(durations_ms) < NUM_STEPS:
        started = time.perf_counter()
        plan = scheduler.schedule()
        elapsed = time.perf_counter() - started
        sampled = [[rng.randrange(10, 50_000)] for item in plan.scheduled if item.samples]
        started = time.perf_counter()
        scheduler.commit(plan, sampled)
        elapsed += time.perf_counter() - started
        pool.drain_events()
        if len(plan.scheduled) == num_seqs and plan.num_tokens == num_seqs:
            durations_ms.append(elapsed * 1e3)
    return {
        "num_seqs": num_seqs,
        "num_blocks": num_blocks,
        "p50_ms": round(statistics.median(durations_ms), 4),
        "p99_ms": round(statistics.quantiles(durations_ms, n=100)[98], 4),
        "min_ms": round(min(durations_ms), 4),
    }


def time_pool(num_blocks: int, prompt_blocks: int) -> dict[str, float]:
    """Microseconds a block for a full pool whose every allocation evicts."""
    pool = BlockPool(num_blocks, BLOCK_SIZE)
    num_rounds = 2 * num_blocks // prompt_blocks
    elapsed = 0.0
    num_runs = 0
    for i in range(num_rounds):
        hashes = [i.to_bytes(8) + j.to_bytes(8) for j in range(prompt_blocks)]
        started = time.perf_counter()
        blocks = pool.allocate(prompt_blocks)
        assert blocks is not None
        pool.register(blocks, hashes, root=ROOT)
        pool.free(blocks)
        elapsed += time.perf_counter() - started
        num_runs += 1 + sum(b - a != 1 for a, b in pairwise(blocks))
        pool.drain_events()
    return {
        "num_blocks": num_blocks,
        "allocate_register_free_us_per_block": round(elapsed / num_rounds / prompt_blocks * 1e6, 3),
        "contiguous_runs_per_allocation": round(num_runs / num_rounds, 2),
    }


def wait_for_first_token(
    arrivals: list[tuple[float, int]], tokens_per_s: float, *, short_prompts_pass: bool
) -> list[float]:
    """Seconds from arrival to the end of prefill, for each (arrival_s, prompt tokens)."""
    pool = BlockPool(60_000, BLOCK_SIZE, enable_prefix_caching=False)
    config = SchedulerConfig(
        max_num_seqs=256,
        max_num_batched_tokens=2048,
        max_model_len=100_000,
        short_prompts_pass=short_prompts_pass,
    )
    scheduler = PrefillScheduler(pool, config)
    now_s, i = 0.0, 0
    waits = [0.0] * len(arrivals)
    while i < len(arrivals) or scheduler.queued_tokens:
        if not scheduler.queued_tokens:
            now_s = max(now_s, arrivals[i][0])
        while i < len(arrivals) and arrivals[i][0] <= now_s:
            arrival_s, num_tokens = arrivals[i]
            scheduler.add(make_sequence(str(i), [1] * num_tokens, 1, arrival_s))
            i += 1
        plan = scheduler.schedule()
        now_s += STEP_OVERHEAD_S + plan.num_tokens / tokens_per_s
        for update in scheduler.commit(plan, [[7] for s in plan.scheduled if s.samples]):
            index = int(update.sequence.key.request_id)
            waits[index] = now_s - arrivals[index][0]
            scheduler.release(update.sequence)
    return waits


def compare_policies(seed: int) -> dict[str, object]:
    """Time to first token of short and long prompts, 70 % load, 1 prompt in 20 long."""
    rng = random.Random(seed)
    arrivals: list[tuple[float, int]] = []
    now_s, tokens_per_s = 0.0, 20_000.0
    for _ in range(2000):
        num_tokens = rng.randint(16_000, 32_000) if rng.random() < 0.05 else rng.randint(100, 1000)
        arrivals.append((now_s, num_tokens))
        now_s += rng.expovariate(1.0) * (0.05 * 24_000 + 0.95 * 550) / tokens_per_s / 0.7
    results: dict[str, object] = {}
    for name, short_prompts_pass in (("first_come_first_served", False), ("short_pass_long", True)):
        waits = wait_for_first_token(arrivals, tokens_per_s, short_prompts_pass=short_prompts_pass)
        short = [w for w, (_, n) in zip(waits, arrivals, strict=True) if n <= 1000]
        long = [w for w, (_, n) in zip(waits, arrivals, strict=True) if n > 1000]
        results[name] = {
            kind: {
                "p50_s": round(statistics.median(values), 3),
                "p95_s": round(statistics.quantiles(values, n=20)[18], 3),
                "max_s": round(max(values), 3),
            }
            for kind, values in (("short", short), ("long", long), ("all", waits))
        }
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=None)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    )
    result = {
        "benchmark": "scheduler",
        "commit": commit.stdout.strip(),
        "seed": arguments.seed,
        "python": platform.python_version(),
        "machine": platform.processor() or platform.machine(),
        "step": [time_decode_steps(num_seqs, 40_000, arguments.seed) for num_seqs in (1, 32, 256)],
        "pool": [time_pool(num_blocks, 128) for num_blocks in (10_000, 100_000)],
        "policy": compare_policies(arguments.seed),
    }
    text = json.dumps(result, indent=2) + "\n"
    sys.stdout.write(text)
    if arguments.output is not None:
        arguments.output.write_text(text)


if __name__ == "__main__":
    main()
