"""Times how long a preempted sequence takes to go on: computed anew, or swapped.

    python -m benchmarks.gpu.swap [--layers 32] [--out benchmarks/results/gpu-swap.json]

Llama-3.1-8B's shape with random weights. A long sequence and a short one that ranks before it have
too few blocks for both; the long one is preempted, waits for the end of the other and goes on. The
time is that from the other's last token to its own next one, and the step that preempts it is
shown beside a usual one. Both modes must yield the same number of tokens.
"""

import argparse
import json
import random
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch

from benchmarks.commit import current_commit
from benchmarks.gpu.llama_8b import LLAMA_8B
from engine.config import EngineConfig
from engine.engine import Engine
from engine.models.causal_lm import CausalLM
from engine.models.config import read_model_config
from engine.models.registry import build_model
from engine.scheduler import decode
from engine.scheduler.swap import BlockCopies
from engine.sequence import Sequence
from engine.step_loop import StepLoop
from engine.swap import HostBlocks
from engine.weights.source import DummyWeights
from protocol.ids import RequestKey
from protocol.request import Request
from protocol.sampling import SamplingParams

LENGTHS = (1024, 4096, 8192)
SHORT_LEN, NUM_OUTPUTS = 16, 140
BLOCK_SIZE = 16
# Blocks beyond those of the long prompt: enough for all outputs of one sequence, not of both.
NUM_SPARE_BLOCKS = 9
BATCHED_TOKENS = 16384 + 1
MS = 1e3


@dataclass(frozen=True)
class Resumed:
    """`resume_ms` until the next token; `preempt_ms` is the step that gave the blocks away."""

    resume_ms: float
    preempt_ms: float
    step_ms: float


def sequence(loop: StepLoop, name: str, prompt_len: int, rank: int) -> Sequence:
    rng = random.Random(prompt_len)
    request = Request(
        key=RequestKey(name, 0),
        token_ids=[rng.randrange(1000, 100_000) for _ in range(prompt_len)],
        num_prompt_tokens=prompt_len,
        sampling=SamplingParams(temperature=0.0, max_tokens=NUM_OUTPUTS, ignore_eos=True),
    )
    return Sequence(request, loop.engine.root_hash(None), float(rank))


def measure(model: CausalLM, prompt_len: int, mode: str) -> Resumed:
    # The long one is let in, though there is no room for both to grow.
    decode.WATERMARKS = (0.01, 0.01)
    num_blocks = prompt_len // BLOCK_SIZE
    config = EngineConfig(
        block_size=BLOCK_SIZE,
        max_num_seqs=4,
        max_num_batched_tokens=BATCHED_TOKENS,
        enable_prefix_caching=False,
        num_gpu_blocks_override=num_blocks + max(NUM_SPARE_BLOCKS, num_blocks // 100 + 3),
        preemption_mode=mode,
    )
    loop = StepLoop(Engine(config, "dummy", model))
    times: list[float] = []
    for _ in range(2):  # the first time takes first-use costs
        resumed = _preempt_and_resume(loop, prompt_len, times)
    return resumed


def _preempt_and_resume(loop: StepLoop, prompt_len: int, times: list[float]) -> Resumed:
    short = sequence(loop, "short", SHORT_LEN, 0)
    long = sequence(loop, "long", prompt_len, 1)
    loop.add(short)
    loop.add(long)
    times.clear()
    preempt_s = short_end = long_next = None
    num_tokens = 0
    while loop.has_work:
        started = time.perf_counter()
        was_running = long.num_preemptions == 0
        results = list(loop.step())
        now = time.perf_counter()
        num_tokens += len(results)
        times.append(now - started)
        if was_running and long.num_preemptions:
            preempt_s = now - started
        for result in results:
            if result.update.sequence is short and result.update.finish_reason:
                short_end = now
            if result.update.sequence is long and short_end and long_next is None:
                long_next = now
    assert num_tokens == 2 * NUM_OUTPUTS
    assert long.num_preemptions == 1
    assert preempt_s is not None
    assert short_end is not None
    assert long_next is not None
    return Resumed(MS * (long_next - short_end), MS * preempt_s, MS * median(times))


def copy_gb_per_s(engine: Engine, *, scattered: bool) -> dict[str, float]:
    """The copies alone, by the device's clock."""
    num_blocks = 512
    host = HostBlocks(engine.kv_pool, engine.model.layout, num_blocks)
    blocks = list(range(2 * num_blocks))
    if scattered:
        random.Random(1).shuffle(blocks)
    pairs = list(zip(blocks[:num_blocks], range(num_blocks), strict=True))
    rates: dict[str, float] = {}
    for name, copies in (("out", BlockCopies(out=pairs)), ("back", BlockCopies(back=pairs))):
        times: list[float] = []
        for _ in range(4):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            host.run(copies)
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) / MS)
        rates[name] = num_blocks * engine.model.layout.block_bytes / min(times) / 1e9
    return rates


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--commit", default=current_commit(), help="where the machine has no git")
    args = parser.parse_args()
    with TemporaryDirectory() as model_dir:
        shape = LLAMA_8B | {"num_hidden_layers": args.layers}
        (Path(model_dir) / "config.json").write_text(json.dumps(shape))
        model_config = read_model_config(Path(model_dir))
    model = build_model(model_config, DummyWeights(torch.bfloat16, torch.device("cuda")))
    results: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"),
        "commit": args.commit,
        "card": torch.cuda.get_device_name(),
        "layers": args.layers,
        "resume": [],
    }
    for prompt_len in LENGTHS:
        for mode in ("recompute", "swap"):
            resumed = measure(model, prompt_len, mode)
            row = {"prompt_len": prompt_len, "mode": mode, **vars(resumed)}
            results["resume"].append(row)
            print(row, flush=True)
    config = EngineConfig(num_gpu_blocks_override=1024, max_num_seqs=4)
    engine = Engine(config, "dummy", model)
    for name, scattered in (("contiguous", False), ("scattered", True)):
        results[f"copy_{name}_gb_per_s"] = copy_gb_per_s(engine, scattered=scattered)
    print(json.dumps(results, indent=1))
    if args.out:
        args.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
