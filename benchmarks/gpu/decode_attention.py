"""Times decode attention at Llama-3.1-8B's shape, over contexts of one length and of many.

    python -m benchmarks.gpu.decode_attention [--tiles] [--out FILE]

A layer is the product to q, k and v, attention, which rotates and stores the new token, and the
product to gate and up, so that nothing that attention reads is left in the L2 cache from the layer
before, as in a model. Microseconds are of such a layer less one without attention. Layers are
captured in one CUDA graph; the plan of contexts' pieces is made once before them. "apart" has RoPE
and storing as a kernel of its own, "alone" has neither; nor have FlashInfer's kernels, where it is
installed. "limit" is reading keys and values at 3,100 GB/s. Attention, of old tokens, is checked
against torch. `--tiles` goes on to time other tiles.
"""

import argparse
import functools
import itertools
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.commit import current_commit
from benchmarks.gpu.graph_time import Call, time_s
from benchmarks.gpu.kernels import BLOCK_SIZE, HEAD_DIM, HEADS, KV_HEADS, make_batch
from benchmarks.gpu.library_attention import FlashInferCall, flashinfer_calls
from kernels.attention import paged_attention_reference
from kernels.gpu.decode_attention import decode_attention
from kernels.gpu.decode_plan import DecodePlan, plan_contexts
from kernels.gpu.decode_rope import NewTokens
from kernels.gpu.decode_tiles import DecodeTile
from kernels.gpu.launching import compile_ahead
from kernels.gpu.rope import rope_and_store_kv
from kernels.gpu.sizes import ceil_div
from kernels.kv_format import UNSCALED
from kernels.linear import linear, pack_linear

DTYPES = (torch.bfloat16, torch.float8_e4m3fn)
# Weights are of more layers than the L2 cache holds; contexts of no more than it takes.
NUM_LAYERS, CONTEXT_BYTES = 8, 160 << 20
HIDDEN, GATE_AND_UP = 4096, 28_672
REPEATS = 15
TILES = {
    torch.bfloat16: [
        DecodeTile(64, 2, 2, 4, shortest_piece=2, merged=32),
        DecodeTile(64, 4, 2, 4, shortest_piece=2),
        DecodeTile(64, 2, 2, 5, merged=32),
        DecodeTile(32, 1, 2, 8, merged=32),
    ],
    torch.float8_e4m3fn: [
        DecodeTile(32, 1, 3, 8),
        DecodeTile(32, 1, 2, 10),
        DecodeTile(64, 2, 3, 4, merged=128),
        DecodeTile(64, 4, 3, 4, merged=128),
    ],
}
OPTIONS: dict[str, Any] = {"scale": HEAD_DIM**-0.5, "sliding_window": None, "softcap": None}
# bfloat16 keeps 8 bits.
ERROR = 8e-3
# The logarithms' deviation and mean: about 1,300 tokens on average.
SPREAD, MEAN = 1.2, 6.6
SHORTEST, LONGEST = 16, 32_680


def mixed(num: int) -> list[int]:
    """Lengths as requests have them: most are short, few are long."""
    drawn = torch.randn(num, generator=torch.Generator().manual_seed(num)) * SPREAD + MEAN
    return drawn.exp().clamp(SHORTEST, LONGEST).int().tolist()


CONTEXTS = {
    "1 x 1168": [1168],
    "4 x 1168": [1168] * 4,
    "16 x 1168": [1168] * 16,
    "48 x 1168": [1168] * 48,
    "64 x 1168": [1168] * 64,
    "256 x 1168": [1168] * 256,
    "8 x 32680": [32680] * 8,
    "16 x 32680": [32680] * 16,
    "1 x 32680, 63 x 1168": [32680] + [1168] * 63,
    "64 mixed": mixed(64),
    "256 mixed": mixed(256),
}


class Contexts:
    """Layers of keys and values for sequences of those lengths, and one new token of each."""

    def __init__(self, lengths: Sequence[int], dtype: torch.dtype) -> None:
        num_seqs, longest = len(lengths), max(lengths)
        kv_lens = torch.tensor(lengths, device="cuda", dtype=torch.int32)
        nums_blocks = [ceil_div(length, BLOCK_SIZE) for length in lengths]
        num_blocks = sum(nums_blocks)
        order = torch.randperm(num_blocks, device="cuda", dtype=torch.int32)
        tables = torch.zeros(num_seqs, max(nums_blocks), device="cuda", dtype=torch.int32)
        for table, blocks in zip(tables, order.split(nums_blocks), strict=True):
            table[: len(blocks)] = blocks
        last = (kv_lens - 1).long()
        blocks = tables.gather(1, (last // BLOCK_SIZE)[:, None])[:, 0].long()
        self.batch = replace(
            make_batch(num_seqs, 1, longest),
            kv_lens=kv_lens,
            block_tables=tables,
            slots=blocks * BLOCK_SIZE + last % BLOCK_SIZE,
            positions=last,
        )
        layer = (2, KV_HEADS, BLOCK_SIZE, HEAD_DIM)
        layer_bytes = num_blocks * torch.Size(layer).numel() * dtype.itemsize
        num_layers = min(NUM_LAYERS, max(2, ceil_div(CONTEXT_BYTES, layer_bytes)))
        self.pool = torch.empty((num_blocks, num_layers, *layer), device="cuda", dtype=dtype)
        for index in range(num_layers):
            values = torch.randn((num_blocks, *layer), device="cuda", dtype=torch.bfloat16)
            self.pool[:, index] = values.to(dtype)
        self.limit_s = 2 * sum(lengths) * KV_HEADS * HEAD_DIM * dtype.itemsize / 3.1e12
        self.hidden = torch.randn(num_seqs, HIDDEN, device="cuda", dtype=torch.bfloat16)
        scale = HIDDEN**-0.5
        self.weights = [
            tuple(
                pack_linear(scale * torch.randn(size, HIDDEN, device="cuda", dtype=torch.bfloat16))
                for size in ((HEADS + 2 * KV_HEADS) * HEAD_DIM, GATE_AND_UP)
            )
            for _ in range(NUM_LAYERS)
        ]
        self.query = torch.randn(num_seqs, HEADS, HEAD_DIM, device="cuda", dtype=torch.bfloat16)
        angles = torch.randn(longest, HEAD_DIM // 2, device="cuda")
        self.cos_sin = torch.cat((angles.cos(), angles.sin()), dim=1)

    def plan(self, tile: DecodeTile | None = None) -> DecodePlan:
        return plan_contexts(self.batch, self.pool, None, tile=tile)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, *, plan: DecodePlan) -> Tensor:
        """New tokens, on the way."""
        new = NewTokens(k, v, self.cos_sin, UNSCALED)
        return decode_attention(q, self.pool, layer, self.batch, new=new, plan=plan, **OPTIONS)

    def attend_apart(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, *, plan: DecodePlan
    ) -> Tensor:
        rope_and_store_kv(q, k, v, self.cos_sin, self.batch, self.pool, layer)
        return self.attend_alone(layer, q, plan=plan)

    def attend_alone(self, layer: int, q: Tensor, *_: Tensor, plan: DecodePlan) -> Tensor:
        return decode_attention(q, self.pool, layer, self.batch, plan=plan, **OPTIONS)

    def attend_elsewhere(self, layer: int, q: Tensor, *_: Tensor, attend: FlashInferCall) -> Tensor:
        return attend(q, self.pool[:, layer])

    def layer(self, layer: int, attend: Callable[..., Tensor] | None) -> Tensor:
        qkv_weight, gate_and_up = self.weights[layer]
        qkv = linear(self.hidden, qkv_weight).unflatten(1, (-1, HEAD_DIM))
        if attend is not None:
            heads = qkv.split([HEADS, KV_HEADS, KV_HEADS], 1)
            attend(layer % self.pool.shape[1], *heads)
        return linear(self.hidden, gate_and_up)

    def us(self, attend: Callable[..., Tensor] | None) -> float:
        """A layer's."""
        layers = range(NUM_LAYERS)
        calls: list[Call] = [functools.partial(self.layer, each, attend) for each in layers]
        return 1e6 * time_s(calls, repeats=REPEATS)

    def error(self, plan: DecodePlan, expected: Tensor) -> float:
        """Of the first layer, relative."""
        return relative(self.attend_alone(0, self.query, plan=plan), expected)

    def expected(self) -> Tensor:
        pool = self.pool[:, :1].to(torch.bfloat16)
        query, scale = self.query.float(), OPTIONS["scale"]
        return paged_attention_reference(query, pool, 0, self.batch, scale=scale).double()


def relative(actual: Tensor, expected: Tensor) -> float:
    return ((actual.double() - expected).norm() / expected.norm()).item()


def bench(name: str, dtype: torch.dtype, *, tiles: bool) -> dict[str, Any]:
    contexts = Contexts(CONTEXTS[name], dtype)
    plan = contexts.plan()
    attend = functools.partial(contexts.attend, plan=plan)
    # The newest tokens' keys and values are there from now on, and clocks are up.
    contexts.us(attend)
    expected = contexts.expected()
    contexts.us(attend)
    without_us = contexts.us(None)

    def us(attend: Callable[..., Tensor]) -> float:
        return round(contexts.us(attend) - without_us, 2)

    row: dict[str, Any] = {
        "contexts": name,
        "kv": str(dtype).removeprefix("torch."),
        "limit_us": round(1e6 * contexts.limit_s, 2),
        "tile": str(plan.tile),
        "us": us(attend),
        "apart_us": us(functools.partial(contexts.attend_apart, plan=plan)),
        "alone_us": us(functools.partial(contexts.attend_alone, plan=plan)),
        "errors": [contexts.error(plan, expected)],
    }
    query, scale = contexts.query, OPTIONS["scale"]
    others = flashinfer_calls(contexts.pool, contexts.batch, query.dtype, HEADS, scale=scale)
    for other, call in others.items():
        row[f"{other}_us"] = us(functools.partial(contexts.attend_elsewhere, attend=call))
        row["errors"].append(relative(call(query, contexts.pool[:, 0]), expected))
    if tiles:
        row["tiles"] = {}
        for tile in TILES[dtype]:
            plan = contexts.plan(tile)
            row["tiles"][str(tile)] = us(functools.partial(contexts.attend, plan=plan))
            row["errors"].append(contexts.error(plan, expected))
    return row


def compile_kernels(*, tiles: bool) -> None:
    def launch_all() -> None:
        for dtype, name in itertools.product(DTYPES, ("1 x 1168", "4 x 1168", "16 x 1168")):
            contexts = Contexts(CONTEXTS[name], dtype)
            for tile in (None, *(TILES[dtype] if tiles else ())):
                plan = contexts.plan(tile)
                contexts.layer(0, functools.partial(contexts.attend, plan=plan))
                contexts.attend_alone(0, contexts.query, plan=plan)

    compile_ahead(launch_all, progress=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n", 1)[0])
    parser.add_argument("--tiles", action="store_true")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--commit", default=current_commit(), help="where the machine has no git")
    args = parser.parse_args()
    compile_kernels(tiles=args.tiles)
    rows: list[dict[str, Any]] = []
    results = {
        "date": time.strftime("%Y-%m-%d"),
        "commit": args.commit,
        "card": torch.cuda.get_device_name(),
        "rows": rows,
    }
    for dtype, name in itertools.product(DTYPES, CONTEXTS):
        rows.append(bench(name, dtype, tiles=args.tiles))
        print(json.dumps(rows[-1]), flush=True)
        torch.cuda.empty_cache()
        if args.out:
            args.out.write_text(json.dumps(results, indent=1) + "\n")
    worst = max(error for row in rows for error in row["errors"])
    # Not a number never passes.
    if not worst < ERROR:
        raise SystemExit(f"results are off by up to {worst}")


if __name__ == "__main__":
    main()
