"""Times the Triton kernels at Llama-3.1-8B's shapes, beside torch's and the card's bandwidth.

    python -m benchmarks.gpu.kernels [linear] [prefill] [decode] [--out FILE]

Calls are captured in a CUDA graph, so that launches cost nothing, and walk over several sets of
inputs, so that what one call left in the L2 cache doesn't help the next.
"""

import argparse
import functools
import itertools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.commit import current_commit
from kernels.attention import AttentionBatch
from kernels.gpu.decode_attention import decode_attention
from kernels.gpu.hopper.support import is_supported
from kernels.gpu.linear import linear
from kernels.gpu.linear_tiles import LinearTile
from kernels.gpu.prefill_attention import PrefillTile, prefill_attention

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
ROTATION_BYTES = 400 << 20
HEADS, KV_HEADS, HEAD_DIM, BLOCK_SIZE = 32, 8, 128, 16


Call = Callable[[], object]


def time_s(calls: list[Call], repeats: int = 5) -> float:
    """Seconds a call, over all of `calls` in one graph; the least of some replays."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for call in calls[:2]:
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    times: list[float] = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3 / len(calls))
    return min(times)


def bench_linear() -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for (name, (n, k)), m in itertools.product(LINEARS.items(), NUM_TOKENS):
        num_bytes = 2 * n * k
        weights = [
            torch.randn(n, k, device="cuda", dtype=torch.bfloat16)
            for _ in range(max(2, ROTATION_BYTES // num_bytes))
        ]
        x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
        library_s = time_s([functools.partial(torch.nn.functional.linear, x, w) for w in weights])
        best: tuple[float, LinearTile] | None = None
        for tile in LINEAR_TILES:
            if name == "head" and tile.splits > 1:
                continue
            try:
                seconds = time_s(_linear_calls(x, weights, tile), repeats=3)
            except Exception as error:  # noqa: BLE001  (a tile that doesn't fit the card)
                print("no", tile, type(error).__name__)
                torch.cuda.synchronize()
                continue
            if best is None or seconds < best[0]:
                best = seconds, tile
        default_s = time_s(_linear_calls(x, weights, None))
        assert best is not None
        row = {
            "linear": name,
            "tokens": m,
            "library_gb_per_s": num_bytes / library_s / 1e9,
            "default_gb_per_s": num_bytes / default_s / 1e9,
            "best_gb_per_s": num_bytes / best[0] / 1e9,
            "best": str(best[1]),
        }
        print(row, flush=True)
        rows.append(row)
    return rows


def _linear_calls(x: Tensor, weights: list[Tensor], tile: LinearTile | None) -> list[Call]:
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
    """The portable kernel in each tile, Hopper's own where the card is one, and cuDNN's through
    torch, which takes contiguous keys and values of sequences of one length, without a context."""
    rows: list[dict[str, Any]] = []
    options = {"scale": HEAD_DIM**-0.5, "sliding_window": None, "softcap": None}
    for num_seqs, num_queries, kv_len in PREFILL_SHAPES:
        batch = make_batch(num_seqs, num_queries, kv_len)
        q, pool = _attention_inputs(batch, 1)
        context = kv_len - num_queries
        flops = 4 * HEADS * HEAD_DIM * num_seqs * num_queries * (context + num_queries / 2)
        calls: dict[str, Call] = {
            str(tile): functools.partial(prefill_attention, q, pool, 0, batch, **options, tile=tile)
            for tile in PREFILL_TILES
        }
        if is_supported(q, pool, batch, sliding_window=None, softcap=None):
            from kernels.gpu.hopper.attention import hopper_attention

            hopper = functools.partial(hopper_attention, q, pool, 0, batch, scale=HEAD_DIM**-0.5)
            calls["hopper"] = hopper
            cos_sin = torch.rand(kv_len, HEAD_DIM, device="cuda")
            calls["hopper, rotating"] = functools.partial(hopper, cos_sin=cos_sin)
        if not context:
            calls["cudnn"] = _cudnn_call(num_seqs, num_queries)
        for name, call in calls.items():
            try:
                seconds = time_s([call])
            except Exception as error:  # noqa: BLE001  (a tile that doesn't fit the card)
                print("no", name, type(error).__name__)
                continue
            row = {
                "prefill": [num_seqs, num_queries, kv_len],
                "kernel": name,
                "tflops": flops / seconds / 1e12,
            }
            print(row, flush=True)
            rows.append(row)
    return rows


def _cudnn_call(num_seqs: int, num_queries: int) -> Call:
    q, k, v = (
        torch.randn(num_seqs, num_queries, heads, HEAD_DIM, device="cuda", dtype=torch.bfloat16)
        for heads in (HEADS, KV_HEADS, KV_HEADS)
    )
    heads_first = [x.transpose(1, 2) for x in (q, k, v)]
    attention = torch.ops.aten._scaled_dot_product_cudnn_attention  # noqa: SLF001
    return functools.partial(attention, *heads_first, None, compute_log_sumexp=True, is_causal=True)


def bench_decode() -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    dtypes = (torch.bfloat16, torch.float8_e4m3fn)
    shapes = ((1, 1168), (16, 1168), (64, 1168), (256, 1168), (8, 32768), (16, 32768))
    for dtype, (num_seqs, kv_len) in itertools.product(dtypes, shapes):
        num_layers = 2 if kv_len > 8192 else 4
        batch = make_batch(num_seqs, 1, kv_len)
        q, pool = _attention_inputs(batch, num_layers)
        pool = pool.to(dtype)
        options = {"scale": 0.1, "sliding_window": None, "softcap": None}
        calls = [
            functools.partial(decode_attention, q, pool, layer, batch, **options)
            for layer in range(num_layers)
        ]
        seconds = time_s(calls)
        num_bytes = pool.nbytes / num_layers
        row = {
            "decode": [num_seqs, kv_len],
            "kv": str(dtype).removeprefix("torch."),
            "us": 1e6 * seconds,
            "gb_per_s": num_bytes / seconds / 1e9,
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
