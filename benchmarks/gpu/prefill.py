"""Says where prefill's time goes on a GPU: milliseconds of each kind of kernel, and of none.

    python -m benchmarks.gpu.prefill [--quantization fp8] [--kv-cache-dtype fp8] [--out FILE]

The model has Llama-3.1-8B's shape and random weights. Each row of prompts is computed twice: once
for its tokens a second, and once more under the profiler.
"""

import argparse
import json
import time
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from benchmarks.gpu.engine import PREFILL, add_requests, device_spans, make_engine, run_step
from benchmarks.gpu.kernels import current_commit
from engine.engine import Engine
from engine.step_loop import StepLoop

# The first that a kernel's name holds says what it does.
KINDS = (
    ("attention", "attention"),
    ("widen_blocks", "cached tokens made ready"),
    ("transpose", "cached tokens made ready"),
    ("silu_and_mul", "SiLU · mul"),
    ("rope", "RoPE, store"),
    ("norm", "add, norm"),
    ("quantize", "quantization"),
    ("nvjet", "products"),
    ("gemm", "products"),
    ("cutlass", "products"),
    ("linear", "products"),
)


def kind_of(kernel: str) -> str:
    return next((kind for part, kind in KINDS if part in kernel.lower()), "other")


def compute(engine: Engine, num_seqs: int, prompt_len: int) -> float:
    """Seconds until all prompts have their tokens."""
    loop = StepLoop(engine)
    add_requests(loop, num_seqs, prompt_len, 1)
    total_s = 0.0
    while loop.has_work:
        total_s += run_step(loop)[1]
    return total_s


def kernel_ms(engine: Engine, num_seqs: int, prompt_len: int) -> dict[str, float]:
    kinds: Counter[str] = Counter()
    others: Counter[str] = Counter()
    spans = device_spans(lambda: compute(engine, num_seqs, prompt_len))
    until = spans[0][0]
    for start, end, name in spans:
        kind = kind_of(name)
        kinds[kind] += end - start
        if kind == "other":
            others[name] += end - start
        kinds["nothing"] += max(0.0, start - until)
        until = max(until, end)
    print("other:", others.most_common(5))
    return {kind: microseconds / 1e3 for kind, microseconds in kinds.most_common()}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--quantization", choices=("fp8",))
    parser.add_argument("--kv-cache-dtype", default="auto")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--commit", default=current_commit(), help="where the machine has no git")
    args = parser.parse_args()
    with TemporaryDirectory() as model_dir:
        engine, _ = make_engine(
            Path(model_dir),
            32,
            quantization=args.quantization,
            kv_cache_dtype=args.kv_cache_dtype,
        )
    results: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"),
        "commit": args.commit,
        "card": torch.cuda.get_device_name(),
        "quantization": args.quantization,
        "kv_cache_dtype": args.kv_cache_dtype,
        "rows": [],
    }
    compute(engine, 8, 2048)
    for num_seqs, prompt_len in PREFILL:
        tokens_per_s = num_seqs * prompt_len / compute(engine, num_seqs, prompt_len)
        row = {
            "num_seqs": num_seqs,
            "prompt_len": prompt_len,
            "tokens_per_s": tokens_per_s,
            "ms": kernel_ms(engine, num_seqs, prompt_len),
        }
        results["rows"].append(row)
        print(row, flush=True)
    if args.out:
        args.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
