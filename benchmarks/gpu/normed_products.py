"""Times products that take the norm of their inputs themselves, beside a norm's kernel and then a
product, at Llama-3.1-8B's shapes.

    python -m benchmarks.gpu.normed_products [product] [chain] [--out FILE]

A "product" is one shape by itself. A "chain" is a layer but for attention: output projection, norm,
gate and up, down, norm, qkv, each the predecessor of the next; what it says is what decides.
"apart" are kernels for norms, "folded qkv" and "folded gate_up" take that norm away, "folded"
both. "8" pads tokens to 8, not 16: other matrix instructions, and less shared memory. "s4" copies
in at most four stages, for which less of it suffices, too: then a product's first programs find
room beside the last ones of its predecessor. As in `benchmarks.gpu.kernels`, calls are captured in
CUDA graphs and walk over several weights.
"""

import argparse
import functools
import itertools
import json
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.kernels import LINEARS, ROTATION_BYTES, Call, current_commit, time_s
from kernels.activation import silu_and_mul
from kernels.fp8 import Fp8Rows, quantize_rows
from kernels.gpu.linear import fp8_linear, linear
from kernels.gpu.linear_tiles import LinearTile, fp8_tile_for, normed_tile_for, tile_for
from kernels.norm import Unnormalised, add_rms_norm_fp8, rms_norm

NAMES = ("qkv", "output", "gate_up", "down")
TOKENS = (1, 2, 4, 8, 16)
DTYPE = torch.bfloat16
EPS = 1e-5
Weight = Tensor | Fp8Rows
# bfloat16 keeps 8 bits of a result; of an input, fp8 keeps 4.
ERRORS = {False: 6e-3, True: 4e-2}


def make_weight(name: str, *, is_fp8: bool) -> Weight:
    weight = torch.randn(LINEARS[name], device="cuda", dtype=DTYPE)
    return quantize_rows(weight) if is_fp8 else weight


def default_tile(name: str, num_tokens: int, *, is_fp8: bool, is_normed: bool) -> LinearTile:
    shape, gated = LINEARS[name], name == "gate_up"
    if is_normed:
        return normed_tile_for(num_tokens, *shape, is_fp8=is_fp8, gated=gated)
    if is_fp8:
        return fp8_tile_for(num_tokens, *shape, gated=gated)
    return tile_for(num_tokens, *shape)


def multiply(
    x: Tensor | Fp8Rows | Unnormalised,
    weight: Weight,
    tile: LinearTile,
    *,
    residual: Tensor | None = None,
    gated: bool = False,
) -> Tensor:
    if isinstance(weight, Tensor):
        assert not isinstance(x, Fp8Rows)
        out = linear(x, weight, None, residual=residual, tile=tile)
        return silu_and_mul(out) if gated else out
    options: dict[str, Any] = {"dtype": DTYPE, "residual": residual, "gated": gated, "tile": tile}
    return fp8_linear(x, weight, None, **options)


def normed(x: Unnormalised, weight: Weight) -> Tensor | Fp8Rows:
    if isinstance(weight, Tensor):
        return x.normalised()
    return add_rms_norm_fp8(None, x.rows, x.weight, x.eps)[0]


def normed_product(
    x: Unnormalised, weight: Weight, tile: LinearTile, *, folded: bool, gated: bool = False
) -> Tensor:
    return multiply(x if folded else normed(x, weight), weight, tile, gated=gated)


def product_tiles(name: str, num_tokens: int, *, is_fp8: bool) -> dict[str, LinearTile]:
    """Tiles for the folded product. Only long ones have their norm's weights copied in time."""
    default = default_tile(name, num_tokens, is_fp8=is_fp8, is_normed=True)
    tiles = {"folded": default, "folded s3": replace(default, num_stages=3)}
    if not is_fp8:
        tiles["folded 128"] = LinearTile()
    if num_tokens <= 8:
        tiles["folded 8"] = replace(default, least_tokens=8)
    return tiles


def bench_products() -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for is_fp8, name in itertools.product((False, True), NAMES):
        size = LINEARS[name][1]
        num_bytes = LINEARS[name][0] * size * (1 if is_fp8 else 2)
        num_weights = max(2, ROTATION_BYTES // num_bytes)
        weights = [make_weight(name, is_fp8=is_fp8) for _ in range(num_weights)]
        for num_tokens in TOKENS:
            stream = torch.randn(num_tokens, size, device="cuda", dtype=DTYPE)
            gain = torch.rand(size, device="cuda", dtype=DTYPE) + 0.5
            x = Unnormalised(stream, gain, EPS)
            gated = is_fp8 and name == "gate_up"
            plain = default_tile(name, num_tokens, is_fp8=is_fp8, is_normed=False)
            cases = {"apart": (plain, False)}
            if num_tokens <= 8:
                cases["apart 8"] = (replace(plain, least_tokens=8), False)
            tiles = product_tiles(name, num_tokens, is_fp8=is_fp8)
            cases |= {key: (tile, True) for key, tile in tiles.items()}
            row: dict[str, Any] = {"product": name, "fp8": is_fp8, "tokens": num_tokens}
            row |= {"us": {}, "errors": {}}
            row["limit_us_at_3100_gb_per_s"] = round(num_bytes / 3.1e6, 2)
            for key, (tile, folded) in cases.items():
                run = functools.partial(normed_product, tile=tile, folded=folded, gated=gated)
                calls: list[Call] = [functools.partial(run, x, weight) for weight in weights]
                row["us"][key] = round(1e6 * time_s(calls), 2)
                actual = normed_product(x, weights[0], tile, folded=folded)
                row["errors"][key] = round(error(actual, x, weights[0]), 5)
            print(json.dumps(row), flush=True)
            rows.append(row)
    return rows


def error(actual: Tensor, x: Unnormalised, weight: Weight) -> float:
    exact = rms_norm(x.rows.float(), x.weight.float(), x.eps)
    wide = weight.float() if isinstance(weight, Tensor) else weight.dequantized(torch.float32)
    expected = exact.double() @ wide.double().T
    return ((actual.double() - expected).norm() / expected.norm()).item()


@dataclass(frozen=True)
class Variant:
    """Which products of a chain take their norm, how few tokens any product pads to, and in how
    many stages it copies at most."""

    folded: frozenset[str] = frozenset()
    least_tokens: int = 16
    most_stages: int = 6


BOTH = frozenset({"qkv", "gate_up"})
VARIANTS = {
    "apart": Variant(),
    "folded qkv": Variant(frozenset({"qkv"})),
    "folded gate_up": Variant(frozenset({"gate_up"})),
    "folded": Variant(BOTH),
    "apart s4": Variant(most_stages=4),
    "folded s4": Variant(BOTH, most_stages=4),
    "apart 8": Variant(least_tokens=8),
    "folded 8": Variant(BOTH, least_tokens=8),
    "folded 8 s4": Variant(BOTH, least_tokens=8, most_stages=4),
    "folded 8 s3": Variant(BOTH, least_tokens=8, most_stages=3),
}


def run_chain(
    weights: dict[str, Weight], attended: Tensor, x: Unnormalised, variant: Variant
) -> None:
    num_tokens = len(attended)
    tiles: dict[str, LinearTile] = {}
    for name, weight in weights.items():
        is_fp8, is_normed = isinstance(weight, Fp8Rows), name in variant.folded
        tile = default_tile(name, num_tokens, is_fp8=is_fp8, is_normed=is_normed)
        num_stages = min(tile.num_stages, variant.most_stages)
        tiles[name] = replace(tile, least_tokens=variant.least_tokens, num_stages=num_stages)
    folds = {name: name in variant.folded for name in NAMES}
    multiply(attended, weights["output"], tiles["output"], residual=x.rows)
    inner = normed_product(
        x, weights["gate_up"], tiles["gate_up"], folded=folds["gate_up"], gated=True
    )
    multiply(inner, weights["down"], tiles["down"], residual=x.rows)
    normed_product(x, weights["qkv"], tiles["qkv"], folded=folds["qkv"])


def bench_chains() -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for is_fp8 in (False, True):
        layers = [{name: make_weight(name, is_fp8=is_fp8) for name in NAMES} for _ in range(4)]
        num_bytes = sum(LINEARS[name][0] * LINEARS[name][1] for name in NAMES)
        for num_tokens in TOKENS:
            attended, stream = torch.randn(2, num_tokens, 4096, device="cuda", dtype=DTYPE)
            x = Unnormalised(stream, torch.ones(4096, device="cuda", dtype=DTYPE), EPS)
            row: dict[str, Any] = {"chain": "fp8" if is_fp8 else "bf16", "tokens": num_tokens}
            row["limit_us_at_3100_gb_per_s"] = round(num_bytes * (2 - is_fp8) / 3.1e6, 2)
            row["us"] = {}
            for key, variant in VARIANTS.items():
                if num_tokens > variant.least_tokens:
                    continue
                run = functools.partial(run_chain, attended=attended, x=x, variant=variant)
                calls: list[Call] = [functools.partial(run, weights) for weights in layers]
                row["us"][key] = round(1e6 * time_s(calls, repeats=20), 2)
            print(json.dumps(row), flush=True)
            rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n", 1)[0])
    parser.add_argument("parts", nargs="*", default=["chain", "product"])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--commit", default=current_commit(), help="where the machine has no git")
    args = parser.parse_args()
    benches = {"product": bench_products, "chain": bench_chains}
    results: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"),
        "commit": args.commit,
        "card": torch.cuda.get_device_name(),
    }
    for part in args.parts:
        results[part] = benches[part]()
    if args.out:
        args.out.write_text(json.dumps(results, indent=1) + "\n")
    for row in results.get("product", []):
        if not all(value < ERRORS[row["fp8"]] for value in row["errors"].values()):
            raise SystemExit(f"off: {row}")


if __name__ == "__main__":
    main()
