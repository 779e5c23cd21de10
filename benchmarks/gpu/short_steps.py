"""Times steps with short prompts on a GPU, as CUDA graphs and launched kernel by kernel.

    python -m benchmarks.gpu.short_steps [--quantization fp8] [--kv-cache-dtype fp8] [--out FILE]

The model has Llama-3.1-8B's shape and random weights. "alone" is a prompt on an idle engine until
its token is known; "beside" is a step that computes a prompt beside running sequences, a new prompt
each step. Prompts of 1 token stand for decode steps. Those behind a context find it in the cache,
as a chat's next turn does.
"""

import argparse
import gc
import json
import random
import time
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch

from benchmarks.commit import current_commit
from benchmarks.gpu.engine import add_requests, make_engine, run_step
from engine.engine import Engine
from engine.sequence import Sequence
from engine.step_loop import StepLoop
from protocol.ids import RequestKey
from protocol.request import Request
from protocol.sampling import SamplingParams

PROMPT_LENS = (64, 256, 600, 1000, 2000)
CACHED_CONTEXT = 8192
TURN_LENS = (64, 256, 1000)
NUM_RUNNING = 32
RUNNING_LEN = 1000
NUM_ALONE = 6
NUM_BESIDE = 16
NUM_WARM_UP = 4


def make_prompt(
    engine: Engine, number: int, length: int, num_outputs: int, context: int = 0
) -> Sequence:
    """Different in all but the first `context` tokens."""
    before, rng = random.Random("context"), random.Random(number)
    token_ids = [before.randrange(1000, 100_000) for _ in range(context)]
    token_ids += [rng.randrange(1000, 100_000) for _ in range(length)]
    request = Request(
        key=RequestKey(f"prompt {number}", 0),
        token_ids=token_ids,
        num_prompt_tokens=len(token_ids),
        sampling=SamplingParams(temperature=0.0, max_tokens=num_outputs, ignore_eos=True),
    )
    return Sequence(request=request, root=engine.root_hash(None), arrival_s=1e6 + number)


def alone_ms(engine: Engine, length: int, context: int = 0) -> float:
    loop = StepLoop(engine)
    times: list[float] = []
    for number in range(NUM_WARM_UP + NUM_ALONE):
        # Numbered by length, too: no prompt but its context is in the cache.
        loop.add(make_prompt(engine, 1000 * length + number, length, 1, context))
        started_s = time.perf_counter()
        while loop.has_work:
            run_step(loop)
        times.append(time.perf_counter() - started_s)
    return 1e3 * median(times[NUM_WARM_UP:])


def beside_ms(engine: Engine, length: int, context: int = 0) -> float:
    loop = StepLoop(engine)
    add_requests(loop, NUM_RUNNING, RUNNING_LEN, NUM_WARM_UP + NUM_BESIDE + NUM_RUNNING)
    while loop.scheduler.queued_tokens:
        run_step(loop)
    started_s = 0.0
    numbers = range(NUM_WARM_UP + NUM_BESIDE)
    # The second of its tokens is a running sequence's.
    prompts = [make_prompt(engine, 1000 * length + 500 + n, length, 2, context) for n in numbers]
    for number, prompt in enumerate(prompts):
        if number == NUM_WARM_UP:
            torch.cuda.synchronize()
            started_s = time.perf_counter()
        loop.add(prompt)
        run_step(loop)
    spent_s = time.perf_counter() - started_s
    while loop.has_work:
        run_step(loop)
    return 1e3 * spent_s / NUM_BESIDE


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--quantization", choices=("fp8",))
    parser.add_argument("--kv-cache-dtype", default="auto")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--commit", default=current_commit(), help="where the machine has no git")
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for enforce_eager in (False, True):
        with TemporaryDirectory() as model_dir:
            engine, _ = make_engine(
                Path(model_dir),
                args.layers,
                quantization=args.quantization,
                kv_cache_dtype=args.kv_cache_dtype,
                enforce_eager=enforce_eager,
                enable_prefix_caching=True,
            )
        cases = [(0, length) for length in (1, *PROMPT_LENS)]
        cases += [(CACHED_CONTEXT, length) for length in TURN_LENS]
        for context, length in cases:
            rows.append(
                {
                    "graphs": not enforce_eager,
                    "context": context,
                    "prompt_len": length,
                    "alone_ms": round(alone_ms(engine, length, context), 2),
                    "beside_32_ms": round(beside_ms(engine, length, context), 2),
                }
            )
            print(rows[-1], flush=True)
        del engine
        gc.collect()
        torch.cuda.empty_cache()
    if args.out:
        results = {
            "date": time.strftime("%Y-%m-%d"),
            "commit": args.commit,
            "card": torch.cuda.get_device_name(),
            "quantization": args.quantization,
            "kv_cache_dtype": args.kv_cache_dtype,
            "rows": rows,
        }
        args.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
