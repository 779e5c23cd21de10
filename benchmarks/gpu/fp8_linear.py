"""Times linear layers over fp8 weights at Llama-3.1-8B's shapes, beside torch's.

    python -m benchmarks.gpu.fp8_linear [--out FILE]

As in `benchmarks.gpu.kernels`, calls are captured in CUDA graphs and walk over several weights.
Inputs of 8 bits ("8") and of 16 ("16") are timed, and the error of each beside what rounding the
operands to 8 bits alone costs.
"""

import argparse
import functools
import itertools
import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.commit import current_commit
from benchmarks.gpu.kernels import ROTATION_BYTES, Call, time_s
from kernels.fp8 import Fp8Rows, quantize_rows
from kernels.gpu.fp8_linear import library_linear
from kernels.gpu.linear import fp8_linear
from kernels.gpu.linear_tiles import FEW_FP8_TOKENS, LinearTile

# (out_features, in_features) of a layer's projections.
LINEARS = {
    "qkv": (6144, 4096),
    "output": (4096, 4096),
    "gate_up": (28672, 4096),
    "gated": (28672, 4096),
    "down": (4096, 14336),
}
TOKENS = (1, 16, 64)
MANY_TOKENS = (128, 256, 2048, 16384)
# Those whose inputs no norm could quantize on the way.
BY_16_BITS = ("output", "down")
TILES = [
    LinearTile(rows=rows, inner=inner, splits=splits, num_stages=stages)
    for rows, inner, splits, stages in itertools.product(
        (64, 128), (128, 256, 512), (1, 2, 3, 4), (3, 4, 6)
    )
    if 48 << 10 <= rows * inner * stages <= 128 << 10
]
DTYPE = torch.bfloat16


def inputs(num_tokens: int, name: str, num_weights: int) -> tuple[Tensor, list[Fp8Rows]]:
    out_features, in_features = LINEARS[name]
    x = torch.randn(num_tokens, in_features, device="cuda", dtype=DTYPE)
    shape = (out_features, in_features)
    weights = [
        quantize_rows(torch.randn(shape, device="cuda", dtype=DTYPE)) for _ in range(num_weights)
    ]
    return x, weights


def calls(
    x: Tensor | Fp8Rows, weights: list[Fp8Rows], name: str, tile: LinearTile | None
) -> list[Call]:
    options = {"dtype": DTYPE, "gated": name == "gated", "tile": tile}
    return [functools.partial(fp8_linear, x, weight, None, **options) for weight in weights]


def error(x: Tensor | Fp8Rows, weight: Fp8Rows) -> float:
    """Of the kernel against the product of the same numbers in float64, relative."""
    exact = x.dequantized(torch.float64) if isinstance(x, Fp8Rows) else x.double()
    expected = exact @ weight.dequantized(torch.float64).T
    actual = fp8_linear(x, weight, None, dtype=torch.float32)
    return ((actual - expected).norm() / expected.norm()).item()


def tiles(name: str) -> list[LinearTile]:
    if name == "gated":
        return [tile for tile in TILES if tile.splits == 1 and tile.rows == 64]
    if name == "gate_up":
        return [tile for tile in TILES if tile.splits == 1]
    return TILES


def bench_few() -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for name, num_tokens in itertools.product(LINEARS, TOKENS):
        num_bytes = LINEARS[name][0] * LINEARS[name][1]
        x, weights = inputs(num_tokens, name, max(2, ROTATION_BYTES // num_bytes))
        quantized = quantize_rows(x)
        library = [
            functools.partial(library_linear, quantized, w, None, dtype=DTYPE) for w in weights
        ]
        row: dict[str, Any] = {
            "linear": name,
            "tokens": num_tokens,
            "library": round(num_bytes / time_s(library) / 1e9),
        }
        for bits, given in (("8", quantized), ("16", x)):
            if bits == "16" and name not in BY_16_BITS:
                continue
            timed: list[tuple[float, LinearTile]] = []
            for tile in tiles(name):
                try:
                    timed.append((time_s(calls(given, weights, name, tile), repeats=3), tile))
                except Exception:  # noqa: BLE001  (a tile that doesn't fit the card)
                    torch.cuda.synchronize()
            timed.sort(key=lambda pair: pair[0])
            if bits == "8" or num_tokens <= FEW_FP8_TOKENS:
                default = calls(given, weights, name, None)
                row[f"default_{bits}"] = round(num_bytes / time_s(default) / 1e9)
            row[f"best_{bits}"] = [
                f"{num_bytes / seconds / 1e9:.0f}: {tile.rows}x{tile.inner} /{tile.splits} "
                f"s{tile.num_stages}"
                for seconds, tile in timed[:3]
            ]
            if name != "gated" and f"default_{bits}" in row:
                row[f"error_{bits}"] = round(error(given, weights[0]), 7)
        print(json.dumps(row), flush=True)
        rows.append(row)
    return rows


def bench_many() -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for name, num_tokens in itertools.product(LINEARS, MANY_TOKENS):
        if name == "gated":
            continue
        out_features, in_features = LINEARS[name]
        x, weights = inputs(num_tokens, name, 4)
        quantized = quantize_rows(x)
        library = [
            functools.partial(library_linear, quantized, w, None, dtype=DTYPE) for w in weights
        ]
        seconds = time_s(library)
        row = {
            "linear": name,
            "tokens": num_tokens,
            "library_us": round(1e6 * seconds, 1),
            "library_tflops": round(2 * num_tokens * out_features * in_features / seconds / 1e12),
            "quantize_us": round(1e6 * time_s([functools.partial(quantize_rows, x)] * 4), 1),
        }
        print(json.dumps(row), flush=True)
        rows.append(row)
    return rows


def compile_tiles(share: int, num_shares: int) -> None:
    """Compiles every tile once, into the cache on disk: several processes share the work."""
    weight = quantize_rows(torch.randn(1024, 4096, device="cuda", dtype=DTYPE))
    cases = [
        (num_tokens, tile, name, bits)
        for num_tokens, name, bits in itertools.product(TOKENS[1:], ("gated", "down"), ("8", "16"))
        for tile in tiles(name)
        if bits == "8" or name in BY_16_BITS
    ]
    for num_tokens, tile, name, bits in cases[share::num_shares]:
        x = torch.zeros(num_tokens, 4096, device="cuda", dtype=DTYPE)
        try:
            calls(quantize_rows(x) if bits == "8" else x, [weight], name, tile)[0]()
        except Exception:  # noqa: BLE001, S112  (too large for the card)
            continue


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--commit", default=current_commit(), help="where the machine has no git")
    parser.add_argument("--compile-share", help="k/n: only compile part k of n of the tiles")
    args = parser.parse_args()
    if args.compile_share:
        compile_tiles(*map(int, args.compile_share.split("/")))
        return
    results: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"),
        "commit": args.commit,
        "card": torch.cuda.get_device_name(),
        "many": bench_many(),
        "few": bench_few(),
    }
    if args.out:
        args.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
