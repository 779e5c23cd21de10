"""Times linear layers over fp8 weights at Llama-3.1-8B's shapes, beside torch's.

    python -m benchmarks.gpu.fp8_linear [--out FILE]

As in `benchmarks.gpu.kernels`, calls are captured in CUDA graphs and walk over several weights.
Inputs of 8 bits ("8") and of 16 ("16") are timed. All that is timed is compared with the product of
the same numbers in float64 first, and an error over its bound ends the run: "error" is the largest
of the tiles', and "float32_error" that of the default tile before its result is rounded to 16 bits.
Inputs of 16 bits are rounded to 8 on the way, which alone costs 2.6e-2.
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
from benchmarks.gpu import correctness
from benchmarks.gpu.correctness import (
    FP8_RESULT_ERROR,
    QUANTIZED_ERROR,
    Check,
    rows_of,
    sampled_rows,
)
from benchmarks.gpu.graph_time import time_s
from benchmarks.gpu.kernels import ROTATION_BYTES, TensorCall
from kernels.fp8 import Fp8Rows, quantize_rows
from kernels.gpu.fp8_linear import library_linear
from kernels.gpu.linear import fp8_linear
from kernels.gpu.linear_tiles import LinearTile, few_fp8_tokens

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
    x: Tensor | Fp8Rows,
    weights: list[Fp8Rows],
    name: str,
    tile: LinearTile | None,
    *,
    dtype: torch.dtype = DTYPE,
) -> list[TensorCall]:
    options = {"dtype": dtype, "gated": name == "gated", "tile": tile}
    return [functools.partial(fp8_linear, x, weight, None, **options) for weight in weights]


def expected(x: Tensor | Fp8Rows, weight: Fp8Rows, rows: Tensor, *, gated: bool) -> Tensor:
    """`rows` of the result for the same numbers, in float64."""
    product = correctness.product(x, weight, rows)
    if not gated:
        return product
    gate, up = product.chunk(2, dim=1)
    return torch.nn.functional.silu(gate) * up


def tiles(name: str) -> list[LinearTile]:
    if name == "gated":
        return [tile for tile in TILES if tile.splits == 1 and tile.rows == 64]
    if name == "gate_up":
        return [tile for tile in TILES if tile.splits == 1]
    return TILES


def bench_few() -> list[dict[str, Any]]:
    return [_few_row(name, num_tokens) for name, num_tokens in itertools.product(LINEARS, TOKENS)]


def _few_row(name: str, num_tokens: int) -> dict[str, Any]:
    num_bytes = LINEARS[name][0] * LINEARS[name][1]
    x, weights = inputs(num_tokens, name, max(2, ROTATION_BYTES // num_bytes))
    quantized = quantize_rows(x)
    sample = sampled_rows(num_tokens, x.device)
    library = [functools.partial(library_linear, quantized, w, None, dtype=DTYPE) for w in weights]
    product = expected(quantized, weights[0], sample, gated=False)
    check_library = Check(f"{name}, {num_tokens} tokens", product, bound=FP8_RESULT_ERROR)
    row: dict[str, Any] = {
        "linear": name,
        "tokens": num_tokens,
        "library_error": check_library("the library", library[0]()),
        "library": round(num_bytes / time_s(library) / 1e9),
    }
    for bits, given in (("8", quantized), ("16", x)):
        if bits == "16" and name not in BY_16_BITS:
            continue
        check = Check(
            f"{name}, {num_tokens} tokens of {bits} bits",
            expected(given, weights[0], sample, gated=name == "gated"),
            bound=FP8_RESULT_ERROR if bits == "8" else QUANTIZED_ERROR,
        )
        timed: list[tuple[float, LinearTile]] = []
        for tile in tiles(name):
            tile_calls = calls(given, weights, name, tile)
            try:
                check(str(tile), tile_calls[0]())
                timed.append((time_s(tile_calls, repeats=3), tile))
            except Exception:  # noqa: BLE001  (a tile that doesn't fit the card)
                torch.cuda.synchronize()
        timed.sort(key=lambda pair: pair[0])
        row[f"best_{bits}"] = [
            f"{num_bytes / seconds / 1e9:.0f}: {tile.rows}x{tile.inner} /{tile.splits} "
            f"s{tile.num_stages}"
            for seconds, tile in timed[:3]
        ]
        if bits == "8" or num_tokens <= few_fp8_tokens(x.device):
            default = calls(given, weights, name, None)
            check("the default tile", default[0]())
            row[f"default_{bits}"] = round(num_bytes / time_s(default) / 1e9)
            if name != "gated":
                unrounded = calls(given, weights, name, None, dtype=torch.float32)[0]()
                row[f"float32_error_{bits}"] = check("the default tile to float32", unrounded)
        row[f"error_{bits}"] = max(check.errors.values())
    print(json.dumps(row), flush=True)
    return row


def bench_many() -> list[dict[str, Any]]:
    cases = itertools.product(LINEARS, MANY_TOKENS)
    return [_many_row(name, num_tokens) for name, num_tokens in cases if name != "gated"]


def _many_row(name: str, num_tokens: int) -> dict[str, Any]:
    out_features, in_features = LINEARS[name]
    x, weights = inputs(num_tokens, name, 4)
    quantized = quantize_rows(x)
    library = [functools.partial(library_linear, quantized, w, None, dtype=DTYPE) for w in weights]
    sample = sampled_rows(num_tokens, x.device)
    case = f"{name}, {num_tokens} tokens"
    check_rows = Check(case, x[sample], bound=QUANTIZED_ERROR)
    product = expected(quantized, weights[0], sample, gated=False)
    check = Check(case, product, bound=FP8_RESULT_ERROR, rows=sample)
    row: dict[str, Any] = {
        "linear": name,
        "tokens": num_tokens,
        "quantize_error": check_rows("x", rows_of(quantized, sample).dequantized(torch.float32)),
        "library_error": check("the library", library[0]()),
    }
    seconds = time_s(library)
    row["library_us"] = round(1e6 * seconds, 1)
    row["library_tflops"] = round(2 * num_tokens * out_features * in_features / seconds / 1e12)
    row["quantize_us"] = round(1e6 * time_s([functools.partial(quantize_rows, x)] * 4), 1)
    print(json.dumps(row), flush=True)
    return row


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
