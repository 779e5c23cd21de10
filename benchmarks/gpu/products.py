"""Times products of a step's tokens on a GPU, whole and in two parts, at Llama-3.1-8B's shapes.

    python -m benchmarks.gpu.products [--quantization fp8] [--tokens 1024 1088 ...] [--out FILE]
    python -m benchmarks.gpu.products --cublaslt {all,unscaled} [--out FILE]

The library cuts a product into tiles that run in waves, one tile a multiprocessor: a few tokens
more can cost a whole wave. "parts" are the library's product of the most tokens that are a multiple
of 128 and fewer by up to 256, and that of the rest, by the kernel that `kernels.fp8_linear` or
`kernels.linear` takes. As in `benchmarks.gpu.kernels`, calls are captured in CUDA graphs and walk
over several weights; the two ways take turns. Some rows of each are compared with the product in
float32, or of the same 8-bit numbers in float64, first; an error over its bound ends the run.

`--cublaslt` compares torch's products of 8 bits with cuBLASLt's own (`benchmarks.gpu.cublaslt`).
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.commit import current_commit
from benchmarks.gpu import correctness, cublaslt
from benchmarks.gpu.correctness import FP8_RESULT_ERROR, RESULT_ERROR, Check, sampled_rows
from benchmarks.gpu.cublaslt import LINEARS
from benchmarks.gpu.graph_time import time_s
from kernels.fp8 import Fp8Rows, quantize_rows
from kernels.fp8_linear import Fp8Linear, fp8_linear
from kernels.gpu.fp8_linear import library_linear
from kernels.linear import PackedLinear, linear, pack_linear

TOKENS = (
    *range(320, 1025, 64), 1056, 1072, 1088, 1152, 1280, 1344, 1536, 1600, 1792, 1856, 1920, 2048,
    2064, 2112, 2176, 4096, 4160, 8192, 8256, 8448, 16384, 16896,
)  # fmt: skip
TILE = 128
MOST_OF_REST = 256
NUM_WEIGHTS = 4
DTYPE = torch.bfloat16

Rows = Tensor | Fp8Rows
Product = Callable[[Rows, Any], Tensor]


def part(x: Rows, first: int, last: int) -> Rows:
    if isinstance(x, Fp8Rows):
        return Fp8Rows(x.values[first:last], x.scales[first:last])
    return x[first:last]


def dense_library(x: Rows, weight: PackedLinear) -> Tensor:
    assert isinstance(x, Tensor)
    return torch.nn.functional.linear(x, weight.weight)


def dense(x: Rows, weight: PackedLinear) -> Tensor:
    assert isinstance(x, Tensor)
    return linear(x, weight)


def fp8_library(x: Rows, weight: Fp8Linear) -> Tensor:
    assert isinstance(x, Fp8Rows)
    return library_linear(x, weight.weight, None, dtype=DTYPE)


def fp8(x: Rows, weight: Fp8Linear) -> Tensor:
    return fp8_linear(x, weight, dtype=DTYPE)


def bench(name: str, num_tokens: int, *, is_fp8: bool) -> dict[str, Any]:
    out_features, in_features = LINEARS[name]
    library, ours = (fp8_library, fp8) if is_fp8 else (dense_library, dense)
    x: Rows = torch.randn(num_tokens, in_features, device="cuda", dtype=DTYPE)
    weights: list[Any] = []
    for _ in range(NUM_WEIGHTS):
        weight = torch.randn(out_features, in_features, device="cuda", dtype=DTYPE)
        weights.append(
            Fp8Linear(quantize_rows(weight), None, None) if is_fp8 else pack_linear(weight)
        )
    if is_fp8:
        x = quantize_rows(x)

    def whole(weight: Any) -> Callable[[], Tensor]:  # noqa: ANN401
        return lambda: library(x, weight)

    def parts(weight: Any, first: int) -> Callable[[], list[Tensor]]:  # noqa: ANN401
        return lambda: [
            library(part(x, 0, first), weight),
            ours(part(x, first, num_tokens), weight),
        ]

    sample = sampled_rows(num_tokens, torch.device("cuda"))
    expected = correctness.product(x, weights[0].weight, sample)
    bound = FP8_RESULT_ERROR if is_fp8 else RESULT_ERROR
    check = Check(f"{name}, {num_tokens} tokens", expected, bound=bound, rows=sample)
    row: dict[str, Any] = {"linear": name, "tokens": num_tokens}
    row["whole_error"] = check("the whole", whole(weights[0])())
    seconds = time_s([whole(weight) for weight in weights])
    row["whole_us"] = round(1e6 * seconds, 1)
    row["tflops"] = round(2 * num_tokens * out_features * in_features / seconds / 1e12)
    last = (num_tokens - 1) // TILE * TILE
    for first in range(last, max(num_tokens - MOST_OF_REST, TILE) - 1, -TILE):
        key = f"{first}_and_rest"
        row[f"{key}_error"] = check(key, torch.cat(parts(weights[0], first)()))
        split_s = time_s([parts(weight, first) for weight in weights])
        row[f"{key}_us"] = round(1e6 * split_s, 1)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--quantization", choices=("fp8",))
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    parser.add_argument(
        "--cublaslt", choices=("all", "unscaled"), help="torch's fp8 and cuBLASLt's own"
    )
    parser.add_argument("--out", type=Path)
    parser.add_argument("--commit", default=current_commit(), help="where the machine has no git")
    args = parser.parse_args()
    is_fp8 = args.quantization == "fp8"
    cases = (bench(name, tokens, is_fp8=is_fp8) for name in LINEARS for tokens in args.tokens)
    rows: list[dict[str, Any]] = []
    if args.cublaslt is not None:
        cases = cublaslt.bench(only_unscaled=args.cublaslt == "unscaled")
    for row in cases:
        rows.append(row)
        print(json.dumps(row), flush=True)
    if args.out:
        results = {
            "date": time.strftime("%Y-%m-%d"),
            "commit": args.commit,
            "card": torch.cuda.get_device_name(),
            "quantization": "fp8" if args.cublaslt else args.quantization,
            "rows": rows,
        }
        args.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
