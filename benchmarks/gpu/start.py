"""Times an engine's start with nothing compiled yet, its kernels compiled ahead or as they come.

    python -m benchmarks.gpu.start [--quantization fp8] [--kv-cache-dtype fp8] [--layers 32]
        [--repeats 2] [--ahead-only] [--out benchmarks/results/gpu-start.json]

The model has Llama-3.1-8B's shape and random weights. Each start is a process of its own, in turns
with an empty cache of Triton's, both ways, and with the one that the start before has filled.
Seconds are of imports, of making the weights, and of the parts of `Engine`'s construction: kernels
compiled ahead, the measured largest step and captures of the largest graphs, the warm-up, and the
captures.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.commit import current_commit

_CHILD = "--start-once"


def start_once(args: argparse.Namespace, *, started_s: float) -> dict[str, Any]:
    """Seconds of each phase of a start in this process."""
    import torch
    import triton

    import benchmarks.gpu.engine as shape
    import engine.engine
    import engine.profiling
    from engine.runner import ModelRunner

    seconds: dict[str, float] = {}
    cache = Path(triton.knobs.cache.dir)
    num_found = num_kernels(cache)

    def timed(owner: Any, name: str, phase: str) -> None:  # noqa: ANN401
        call: Callable[..., Any] = getattr(owner, name)

        def measured(*arguments: Any, **options: Any) -> Any:  # noqa: ANN401
            began_s = time.perf_counter()
            result = call(*arguments, **options)
            torch.cuda.synchronize()
            seconds[phase] = time.perf_counter() - began_s
            return result

        setattr(owner, name, measured)

    torch.zeros(1, device="cuda")
    seconds["imports"] = time.perf_counter() - started_s
    if args.as_they_come:
        engine.profiling.compile_kernels = lambda *_, **__: None
    else:
        timed(engine.profiling, "compile_kernels", "compile_ahead")
    timed(shape, "load_model", "weights")
    timed(engine.engine, "measure_gpu_memory", "measure")
    timed(engine.engine, "warm_up", "warm_up")
    # The measuring captures, too, but first: the last call is the one that counts.
    timed(ModelRunner, "capture_graphs", "captures")
    with TemporaryDirectory() as model_dir:
        shape.make_engine(
            Path(model_dir),
            args.layers,
            quantization=args.quantization,
            kv_cache_dtype=args.kv_cache_dtype,
        )
    torch.cuda.synchronize()
    seconds["all"] = time.perf_counter() - started_s
    seconds["measure"] -= seconds.get("compile_ahead", 0.0)
    return {
        "seconds": {phase: round(value, 2) for phase, value in seconds.items()},
        "num_compiled": num_kernels(cache) - num_found,
        "card": torch.cuda.get_device_name(),
        "triton": triton.__version__,
    }


def num_kernels(cache: Path) -> int:
    """Kernels that Triton has compiled, in any process."""
    return sum(1 for _ in cache.glob("*/__grp__*"))


def in_process(cache: str, *flags: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.gpu.start", *sys.argv[1:], _CHILD, *flags]
    environment = os.environ | {"TRITON_CACHE_DIR": cache}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    started_s = time.perf_counter()
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--quantization", choices=("fp8",))
    parser.add_argument("--kv-cache-dtype", default="auto")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--ahead-only", action="store_true", help="no kernels as they come")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--commit", default=current_commit(), help="where the machine has no git")
    parser.add_argument(_CHILD, action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--as-they-come", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.start_once:
        print(json.dumps(start_once(args, started_s=started_s)))
        return
    ways = [(), ("--as-they-come",)][: 1 if args.ahead_only else 2]
    rows: list[dict[str, Any]] = []
    for _ in range(args.repeats):
        for flags in ways:
            with TemporaryDirectory() as cache:
                for is_cached in (False, True):
                    way = "as they come" if flags else "ahead"
                    row = {"compiled": way, "cached": is_cached, **in_process(cache, *flags)}
                    rows.append(row)
                    print(row, flush=True)
    for way in ("ahead", "as they come")[: len(ways)]:
        for is_cached in (False, True):
            starts = [r for r in rows if (r["compiled"], r["cached"]) == (way, is_cached)]
            middle_s = median(row["seconds"]["all"] for row in starts)
            print(f"compiled {way}{', cached' if is_cached else ''}: {middle_s:.1f} s")
    if args.out:
        results = {
            "date": time.strftime("%Y-%m-%d"),
            "commit": args.commit,
            "card": rows[0]["card"],
            "cores": len(os.sched_getaffinity(0)),
            "layers": args.layers,
            "quantization": args.quantization,
            "kv_cache_dtype": args.kv_cache_dtype,
            "rows": rows,
        }
        args.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
