"""Times decode attention at Llama-3.1-8B's shape in every division of the context, merged by the
kernel itself and by a second one.

    python -m benchmarks.gpu.decode_attention [--tiles] [--out FILE]

A layer is the product to q, k and v, RoPE and attention, as in a model; microseconds are of all.
Layers are captured in one CUDA graph over more weights, keys and values than the L2 cache holds.
"apart" merges in a second kernel and "fused" in the same; both ask for nothing ahead of time.
"ahead N" is fused, and asks for its first N tiles while its predecessor ends. "rotated N" is that,
and RoPE is no kernel of its own. Attention is checked against torch, without RoPE. `--tiles` goes
on to time other tiles with the fastest division.
"""

import argparse
import functools
import itertools
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.commit import current_commit
from benchmarks.gpu.graph_time import Call, time_s
from benchmarks.gpu.kernels import BLOCK_SIZE, HEAD_DIM, HEADS, KV_HEADS, make_batch
from kernels.attention import paged_attention_reference
from kernels.gpu.decode_attention import decode_attention
from kernels.gpu.decode_rope import NewTokens
from kernels.gpu.decode_tiles import MAX_SPLITS, DecodeTile, splits_for, tile_for
from kernels.gpu.rope import rope_and_store_kv
from kernels.kv_format import UNSCALED
from kernels.linear import linear, pack_linear

SHAPES = ((1, 1168), (16, 1168), (64, 1168), (256, 1168), (8, 32680), (16, 32680))
DTYPES = (torch.bfloat16, torch.float8_e4m3fn)
# What the card can hold and more; fewer layers than a model has.
ROTATION_BYTES, MAX_LAYERS = 160 << 20, 32
# Above that every division has programs for the whole card many times over.
MAX_PROGRAMS = 4096
SPLITS = [2**i for i in range(MAX_SPLITS.bit_length())]
HIDDEN = 4096
TILES = {
    torch.bfloat16: [(64, 2, 3), (64, 2, 5), (64, 4, 3), (64, 4, 5), (32, 2, 4), (128, 4, 3)],
    torch.float8_e4m3fn: [(32, 1, 4), (32, 1, 6), (64, 2, 4), (64, 4, 3), (64, 4, 5), (128, 4, 3)],
}
OPTIONS: dict[str, Any] = {"scale": HEAD_DIM**-0.5, "sliding_window": None, "softcap": None}
# bfloat16 keeps 8 bits.
ERROR = 8e-3


class Shape:
    """Layers of keys and values for sequences of one length, and one token of each."""

    def __init__(self, num_seqs: int, kv_len: int, dtype: torch.dtype) -> None:
        batch = make_batch(num_seqs, 1, kv_len)
        last = batch.block_tables[:, (kv_len - 1) // BLOCK_SIZE].long() * BLOCK_SIZE
        self.batch = replace(
            batch,
            slots=last + (kv_len - 1) % BLOCK_SIZE,
            positions=torch.full((num_seqs,), kv_len - 1, device="cuda", dtype=torch.int64),
        )
        num_blocks = batch.block_tables.numel()
        layer = (2, KV_HEADS, BLOCK_SIZE, HEAD_DIM)
        layer_bytes = num_blocks * torch.Size(layer).numel() * dtype.itemsize
        num_layers = min(MAX_LAYERS, max(2, -(-ROTATION_BYTES // layer_bytes)))
        self.pool = torch.empty((num_blocks, num_layers, *layer), device="cuda", dtype=dtype)
        for index in range(num_layers):
            values = torch.randn((num_blocks, *layer), device="cuda", dtype=torch.bfloat16)
            self.pool[:, index] = values.to(dtype)
        self.layer_bytes = self.pool.nbytes / num_layers
        self.hidden = torch.randn(num_seqs, HIDDEN, device="cuda", dtype=torch.bfloat16)
        shape = ((HEADS + 2 * KV_HEADS) * HEAD_DIM, HIDDEN)
        scale = HIDDEN**-0.5
        self.weights = [
            pack_linear(scale * torch.randn(shape, device="cuda", dtype=torch.bfloat16))
            for _ in range(num_layers)
        ]
        self.query = torch.randn(num_seqs, HEADS, HEAD_DIM, device="cuda", dtype=torch.bfloat16)
        angles = torch.randn(kv_len, HEAD_DIM // 2, device="cuda")
        self.cos_sin = torch.cat((angles.cos(), angles.sin()), dim=1)

    @property
    def num_pairs(self) -> int:
        return self.batch.num_seqs * KV_HEADS

    def call(self, layer: int, *, rotated: bool = False, **options: Any) -> Tensor:  # noqa: ANN401
        qkv = linear(self.hidden, self.weights[layer]).unflatten(1, (-1, HEAD_DIM))
        q, k, v = qkv.split([HEADS, KV_HEADS, KV_HEADS], 1)
        new = NewTokens(k, v, self.cos_sin, UNSCALED) if rotated else None
        if new is None:
            rope_and_store_kv(q, k, v, self.cos_sin, self.batch, self.pool, layer)
        return decode_attention(q, self.pool, layer, self.batch, new=new, **OPTIONS, **options)

    def variants(self) -> dict[str, dict[str, Any]]:
        default = tile_for(HEAD_DIM, self.pool.element_size(), self.num_pairs)
        tiles = [replace(default, prefetched=ahead) for ahead in range(3)]
        return {
            "apart": {"tile": tiles[0], "is_fused": False},
            "fused": {"tile": tiles[0]},
            "ahead 1": {"tile": tiles[1]},
            **{f"rotated {i}": {"tile": tile, "rotated": True} for i, tile in enumerate(tiles)},
        }

    def us(self, **options: Any) -> float:  # noqa: ANN401
        layers = range(self.pool.shape[1])
        calls: list[Call] = [functools.partial(self.call, layer, **options) for layer in layers]
        return round(1e6 * time_s(calls), 2)

    def error(self, expected: Tensor, **options: Any) -> float:  # noqa: ANN401
        """Of the first layer, relative."""
        actual = decode_attention(self.query, self.pool, 0, self.batch, **OPTIONS, **options)
        return ((actual.double() - expected).norm() / expected.norm()).item()

    def expected(self) -> Tensor:
        self.call(0)  # stores the newest token's keys and values, for good
        pool = self.pool[:, :1].to(torch.bfloat16)
        query, scale = self.query.float(), OPTIONS["scale"]
        return paged_attention_reference(query, pool, 0, self.batch, scale=scale).double()


def bench(num_seqs: int, kv_len: int, dtype: torch.dtype, *, tiles: bool) -> dict[str, Any]:
    shape = Shape(num_seqs, kv_len, dtype)
    expected = shape.expected()
    row: dict[str, Any] = {
        "num_seqs": num_seqs,
        "kv_len": kv_len,
        "kv": str(dtype).removeprefix("torch."),
        "limit_us_at_3100_gb_per_s": round(shape.layer_bytes / 3.1e6, 2),
        "default_splits": splits_for(shape.num_pairs, 32768, shape.pool),
        "us": {},
        "errors": {},
    }
    best: tuple[float, int, str] | None = None
    for splits in SPLITS:
        if splits > 1 and splits * shape.num_pairs > MAX_PROGRAMS:
            continue
        times: dict[str, float] = {}
        errors: dict[str, float] = {}
        for name, options in shape.variants().items():
            times[name] = shape.us(num_splits=splits, **options)
            of_attention = {key: value for key, value in options.items() if key != "rotated"}
            errors[name] = shape.error(expected, num_splits=splits, **of_attention)
            if best is None or times[name] < best[0]:
                best = times[name], splits, name
        row["us"][splits] = times
        row["errors"][splits] = errors
    assert best is not None
    row["best"] = best
    if tiles:
        row["tiles"] = bench_tiles(shape, dtype, best[1])
    return row


def bench_tiles(shape: Shape, dtype: torch.dtype, splits: int) -> dict[str, float]:
    times: dict[str, float] = {}
    for tokens, num_warps, num_stages in TILES[dtype]:
        tile = DecodeTile(tokens=tokens, num_warps=num_warps, num_stages=num_stages)
        try:
            name = f"{tokens} w{num_warps} s{num_stages}"
            times[name] = shape.us(num_splits=splits, tile=tile, rotated=True)
        except Exception as error:  # noqa: BLE001  (a tile that doesn't fit the card)
            print("no", tile, type(error).__name__)
            torch.cuda.synchronize()
    return times


def compile_kernels(share: int, num_shares: int) -> None:
    """Compiles part of them into the cache on disk: several processes share the work."""
    for dtype, num_seqs in itertools.product(DTYPES, (1, 16)):
        shape = Shape(num_seqs, 1168, dtype)
        cases = list(itertools.product(SPLITS, shape.variants().values()))
        for splits, options in cases[share::num_shares]:
            shape.call(0, num_splits=splits, **options)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n", 1)[0])
    parser.add_argument("--tiles", action="store_true")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--commit", default=current_commit(), help="where the machine has no git")
    parser.add_argument("--compile-share", help="k/n: only compile part k of n of the kernels")
    args = parser.parse_args()
    if args.compile_share:
        compile_kernels(*map(int, args.compile_share.split("/")))
        return
    rows: list[dict[str, Any]] = []
    for dtype, (num_seqs, kv_len) in itertools.product(DTYPES, SHAPES):
        rows.append(bench(num_seqs, kv_len, dtype, tiles=args.tiles))
        print(json.dumps(rows[-1]), flush=True)
        torch.cuda.empty_cache()
    results = {
        "date": time.strftime("%Y-%m-%d"),
        "commit": args.commit,
        "card": torch.cuda.get_device_name(),
        "rows": rows,
    }
    if args.out:
        args.out.write_text(json.dumps(results, indent=1) + "\n")
    errors = [error for row in rows for by in row["errors"].values() for error in by.values()]
    if not all(error < ERROR for error in errors):
        raise SystemExit(f"results are off by up to {max(errors)}")


if __name__ == "__main__":
    main()
