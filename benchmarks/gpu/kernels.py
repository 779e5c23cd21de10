"""Times the Triton kernels at Llama-3.1-8B's shapes, beside torch's and the card's bandwidth.

    python -m benchmarks.gpu.kernels [linear] [prefill] [decode] [--out FILE]

Calls are captured in a CUDA graph, so that launches cost nothing, and walk over several sets of
inputs, so that what one call left in the L2 cache doesn't help the next. What is timed is compared
with a float32 reference first; an error over its bound ends the run.

Attention of prompts is counted as 4 * heads * head_dim FLOPs for each pair of a query and a token
that it sees under the causal mask, whatever a kernel computes besides. FlashAttention 3 is timed
over keys and values in one piece, and, as the backend of that name, over the pool. All kernels of
a shape are timed in turns, and the median counts, so that none has a cooler card; "sustained" is
1.5 s on end of each, where the card's power may bind.
"""

import argparse
import functools
import itertools
import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from benchmarks.commit import current_commit
from benchmarks.gpu import correctness
from benchmarks.gpu.correctness import (
    ATTENTION_ERROR,
    FP8_ATTENTION_ERROR,
    RESULT_ERROR,
    Check,
    sampled_rows,
)
from benchmarks.gpu.graph_time import captured, replay_s, time_s
from benchmarks.gpu.library_attention import library_calls
from kernels.attention import AttentionBatch, prepare
from kernels.fp8 import FP8
from kernels.gpu.attention import paged_attention
from kernels.gpu.decode_attention import decode_attention
from kernels.gpu.flash_attention import library
from kernels.gpu.hopper.support import is_supported
from kernels.gpu.linear import linear
from kernels.gpu.linear_tiles import LinearTile
from kernels.gpu.prefill_attention import prefill_attention
from kernels.gpu.prefill_tiles import PrefillTile

# (out_features, in_features) of a layer's projections.
LINEARS = {
    "qkv": (6144, 4096),
    "output": (4096, 4096),
    "gate_up": (28672, 4096),
    "down": (4096, 14336),
    "head": (128256, 4096),
}
NUM_TOKENS = (1, 16, 64)
LINEAR_TILES = [
    LinearTile(rows=rows, inner=inner, splits=splits, num_warps=warps, num_stages=stages)
    for rows, inner, splits, warps, stages in itertools.product(
        (64, 128), (64, 128, 256), (1, 2, 4), (4,), (4, 6)
    )
    if rows * inner * stages <= 64 * 128 * 8
]
PREFILL_TILES = [
    PrefillTile(rows=rows, tokens=tokens, num_warps=warps, num_stages=stages)
    for rows, tokens, warps, stages in (
        (128, 64, 8, 2),
        (128, 64, 8, 3),
        (128, 64, 4, 3),
        (128, 128, 8, 2),
        (64, 64, 4, 3),
        (64, 128, 4, 2),
        (128, 32, 4, 3),
    )
]
# (sequences, queries of each, tokens of each)
PREFILL_SHAPES = ((8, 2048, 2048), (2, 8192, 8192), (1, 16384, 32768), (1, 2048, 32768))
NUM_TURNS = 10
# Contexts from here on are timed for longer, too.
LONG_CONTEXT, SUSTAINED_S = 8192, 1.5
ROTATION_BYTES = 400 << 20
HEADS, KV_HEADS, HEAD_DIM, BLOCK_SIZE = 32, 8, 128, 16
SCALE = HEAD_DIM**-0.5
OPTIONS: dict[str, Any] = {"scale": SCALE, "sliding_window": None, "softcap": None}

TensorCall = Callable[[], Tensor]


def bench_linear() -> list[dict[str, Any]]:
    return [_linear_row(name, m) for name, m in itertools.product(LINEARS, NUM_TOKENS)]


def _linear_row(name: str, m: int) -> dict[str, Any]:
    n, k = LINEARS[name]
    num_bytes = 2 * n * k
    weights = [
        torch.randn(n, k, device="cuda", dtype=torch.bfloat16)
        for _ in range(max(2, ROTATION_BYTES // num_bytes))
    ]
    x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
    expected = correctness.product(x, weights[0], sampled_rows(m, x.device))
    check = Check(f"linear {name}, {m} tokens", expected, bound=RESULT_ERROR)

    def timed_s(what: str, calls: list[TensorCall], repeats: int = 5) -> float:
        check(what, calls[0]())
        return time_s(calls, repeats)

    library = torch.nn.functional.linear
    library_s = timed_s("library", [functools.partial(library, x, w) for w in weights])
    best: tuple[float, LinearTile] | None = None
    for tile in LINEAR_TILES:
        if name == "head" and tile.splits > 1:
            continue
        try:
            seconds = timed_s(str(tile), _linear_calls(x, weights, tile), repeats=3)
        except Exception as error:  # noqa: BLE001  (a tile that doesn't fit the card)
            print("no", tile, type(error).__name__)
            torch.cuda.synchronize()
            continue
        if best is None or seconds < best[0]:
            best = seconds, tile
    default_s = timed_s("default", _linear_calls(x, weights, None))
    assert best is not None
    row = {
        "linear": name,
        "tokens": m,
        "library_gb_per_s": num_bytes / library_s / 1e9,
        "default_gb_per_s": num_bytes / default_s / 1e9,
        "best_gb_per_s": num_bytes / best[0] / 1e9,
        "best": str(best[1]),
        "library_error": check.errors["library"],
        "default_error": check.errors["default"],
        "best_error": check.errors[str(best[1])],
    }
    print(row, flush=True)
    return row


def _linear_calls(x: Tensor, weights: list[Tensor], tile: LinearTile | None) -> list[TensorCall]:
    return [functools.partial(linear, x, weight, None, tile=tile) for weight in weights]


def make_batch(num_seqs: int, num_queries: int, kv_len: int) -> AttentionBatch:
    """Sequences of one length whose blocks lie scattered over the pool."""
    num_blocks = -(-kv_len // BLOCK_SIZE)
    tables = torch.randperm(num_seqs * num_blocks, device="cuda", dtype=torch.int32)
    num_tokens = num_seqs * num_queries
    return AttentionBatch(
        query_starts=torch.arange(num_seqs + 1, device="cuda", dtype=torch.int32) * num_queries,
        kv_lens=torch.full((num_seqs,), kv_len, device="cuda", dtype=torch.int32),
        block_tables=tables.view(num_seqs, num_blocks),
        slots=torch.zeros(num_tokens, device="cuda", dtype=torch.int64),
        positions=torch.zeros(num_tokens, device="cuda", dtype=torch.int64),
        max_query_len=num_queries,
        max_kv_len=kv_len,
        num_seqs=num_seqs,
    )


def _attention_inputs(batch: AttentionBatch, num_layers: int) -> tuple[Tensor, Tensor]:
    shape = (batch.block_tables.numel(), num_layers, 2, KV_HEADS, BLOCK_SIZE, HEAD_DIM)
    pool = torch.randn(shape, device="cuda", dtype=torch.bfloat16)
    q = torch.randn(len(batch.slots), HEADS, HEAD_DIM, device="cuda", dtype=torch.bfloat16)
    return q, pool


def compile_linear(share: int, num_shares: int) -> None:
    """Compiles every tile once, into the cache on disk: several processes share the work."""
    weight = torch.zeros(1024, 4096, device="cuda", dtype=torch.bfloat16)
    cases = list(itertools.product(NUM_TOKENS, LINEAR_TILES))
    for num_tokens, tile in cases[share::num_shares]:
        x = torch.zeros(num_tokens, 4096, device="cuda", dtype=torch.bfloat16)
        try:
            linear(x, weight, None, tile=tile)
        except Exception:  # noqa: BLE001, S112  (too large for the card: the benchmark says so)
            continue


def bench_prefill() -> list[dict[str, Any]]:
    return [_prefill_row(*shape) for shape in PREFILL_SHAPES]


def _prefill_row(num_seqs: int, num_queries: int, kv_len: int) -> dict[str, Any]:
    """The portable kernel in its best tile, Hopper's own where the card is one, and libraries';
    and what `--attention-backend` chooses from, over 8 bits, too."""
    batch = make_batch(num_seqs, num_queries, kv_len)
    q, pool = _attention_inputs(batch, 1)
    case = f"prefill {num_seqs} x {num_queries} over {kv_len}"
    check = _attention_check(case, q, pool, batch)
    calls = _hopper_calls(q, pool, batch) | library_calls(q, pool, 0, batch, scale=SCALE)
    backends = _backend_calls(q, pool, batch)
    if "flash_attention_backend" in backends:
        calls["flash_attention_backend"] = backends["flash_attention_backend"]
    for name, call in calls.items():
        check(name, call().reshape(q.shape))
    pool_8_bits = pool.to(FP8)
    check_8_bits = _attention_check(
        f"{case}, 8 bits", q, pool_8_bits, batch, bound=FP8_ATTENTION_ERROR
    )
    for name, call in _backend_calls(q, pool_8_bits, batch).items():
        check_8_bits(f"{name}_8_bits", call())
        calls[f"{name}_8_bits"] = call
    tiles: dict[str, TensorCall] = {
        str(tile): functools.partial(prefill_attention, q, pool, 0, batch, **OPTIONS, tile=tile)
        for tile in PREFILL_TILES
    }
    best = _fastest(tiles, check)
    calls["portable"] = tiles[best]
    errors = check.errors | check_8_bits.errors | {"portable": check.errors[best]}
    times_s = _in_turns(calls, for_long=kv_len >= LONG_CONTEXT)
    # A query sees its context, itself and the queries before it.
    num_pairs = num_seqs * num_queries * (kv_len - num_queries + (num_queries + 1) / 2)
    tflop = 4 * HEADS * HEAD_DIM * num_pairs / 1e12
    row = {
        "prefill": [num_seqs, num_queries, kv_len],
        "ms": {name: round(1e3 * seconds, 4) for name, seconds in times_s.items()},
        "tflops": {name: round(tflop / seconds, 1) for name, seconds in times_s.items()},
        "errors": {name: errors[name] for name in calls},
        "portable_tile": best,
    }
    print(row, flush=True)
    return row


def _attention_check(
    case: str, q: Tensor, pool: Tensor, batch: AttentionBatch, *, bound: float = ATTENTION_ERROR
) -> Check:
    rows = sampled_rows(len(q), q.device)
    expected = correctness.attention(q, pool, 0, batch, rows, scale=SCALE)
    return Check(case, expected, bound=bound, rows=rows)


def _backend_calls(q: Tensor, pool: Tensor, batch: AttentionBatch) -> dict[str, TensorCall]:
    """As a step has them: blocks gathered or widened, and queries rounded, on the way."""
    batches = {"native": batch}
    try:
        library()
    except ImportError:
        pass
    else:
        batches["flash_attention_backend"] = replace(batch, uses_flash_attention=True)
    return {
        name: functools.partial(paged_attention, q, pool, 0, each, v_scale=1.0, **OPTIONS)
        for name, each in batches.items()
    }


def _hopper_calls(q: Tensor, pool: Tensor, batch: AttentionBatch) -> dict[str, TensorCall]:
    if not is_supported(q, pool, batch, sliding_window=None, softcap=None):
        return {}
    from kernels.gpu.hopper.attention import hopper_attention

    hopper = functools.partial(hopper_attention, q, pool, 0, batch, scale=SCALE)
    # By angles of 0, so that the result is the same.
    angles = torch.zeros(batch.max_query_len, HEAD_DIM, device="cuda")
    angles[:, : HEAD_DIM // 2] = 1.0
    return {"hopper": hopper, "hopper_rotating": functools.partial(hopper, cos_sin=angles)}


def _fastest(calls: dict[str, TensorCall], check: Check) -> str:
    """Which takes least time, of those that fit the card; each is checked first."""
    times_s: dict[str, float] = {}
    for name, call in calls.items():
        try:
            check(name, call())
            times_s[name] = time_s([call])
        except Exception as error:  # noqa: BLE001  (a tile that doesn't fit the card)
            print("no", name, type(error).__name__)
            torch.cuda.synchronize()
    return min(times_s, key=lambda name: times_s[name])


def _in_turns(calls: dict[str, TensorCall], *, for_long: bool) -> dict[str, float]:
    """Seconds of each call, and of one of many on end as `{name}_sustained`."""
    graphs = {name: captured([call]) for name, call in calls.items()}
    turns = [{name: replay_s(graph) for name, graph in graphs.items()} for _ in range(NUM_TURNS)]
    times_s = {name: median(turn[name] for turn in turns) for name in graphs}
    sustained_s: dict[str, float] = {}
    if for_long:
        for name, graph in graphs.items():
            num_replays = round(SUSTAINED_S / times_s[name])
            sustained_s[f"{name}_sustained"] = replay_s(graph, num_replays)
    return times_s | sustained_s


def bench_decode() -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    dtypes = (torch.bfloat16, torch.float8_e4m3fn)
    shapes = ((1, 1168), (16, 1168), (64, 1168), (256, 1168), (8, 32768), (16, 32768))
    for dtype, (num_seqs, kv_len) in itertools.product(dtypes, shapes):
        num_layers = 2 if kv_len > 8192 else 4
        batch = make_batch(num_seqs, 1, kv_len)
        q, pool = _attention_inputs(batch, num_layers)
        pool = pool.to(dtype)
        prepare(batch, pool, [None])
        calls = [
            functools.partial(decode_attention, q, pool, layer, batch, **OPTIONS)
            for layer in range(num_layers)
        ]
        kv = str(dtype).removeprefix("torch.")
        check = _attention_check(f"decode {num_seqs} x {kv_len}, {kv}", q, pool, batch)
        error = check("attention", calls[0]())
        seconds = time_s(calls)
        num_bytes = pool.nbytes / num_layers
        row = {
            "decode": [num_seqs, kv_len],
            "kv": kv,
            "us": 1e6 * seconds,
            "gb_per_s": num_bytes / seconds / 1e9,
            "error": error,
        }
        print(row, flush=True)
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("parts", nargs="*", default=["linear", "prefill", "decode"])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--commit", default=current_commit(), help="where the machine has no git")
    parser.add_argument("--compile-share", help="k/n: only compile part k of n of the tiles")
    args = parser.parse_args()
    if args.compile_share:
        compile_linear(*map(int, args.compile_share.split("/")))
        return
    benches = {"linear": bench_linear, "prefill": bench_prefill, "decode": bench_decode}
    results: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"),
        "commit": args.commit,
        "card": torch.cuda.get_device_name(),
    }
    for part in args.parts:
        results[part] = benches[part]()
    if args.out:
        args.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
