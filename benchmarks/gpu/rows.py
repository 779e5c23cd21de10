"""Times kernels that quantize rows, by how many threads a row has.

    python -m benchmarks.gpu.rows [--out benchmarks/results/gpu-rows.json]

16,384 rows of Llama-3.1-8B's sizes: a norm of 4,096 values, quantizing as many, SiLU · mul of
2 x 14,336, by chunks and elements of a thread, with scales before and without; and rotating the
queries of 32 heads into 8 bits, by how many heads a program has, too.
Each is compared with its reference in torch first; an error over its bound ends the run.
"""

import argparse
import functools
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks.commit import current_commit
from benchmarks.gpu.graph_time import sustained_s
from kernels.activation import silu_and_mul_fp8_reference
from kernels.fp8 import FP8, FP8_MAX, Fp8Rows, quantize_rows_reference
from kernels.gpu import activation, fp8, norm, rope
from kernels.norm import rms_norm_reference
from kernels.turning import turned

NUM_ROWS, HIDDEN, INTERMEDIATE, HEADS, HEAD_DIM = 16384, 4096, 14336, 32, 128
EPS = 1e-5
DTYPE = torch.bfloat16
# Half of e4m3's last bit, for all values.
ERROR = 0.04
SECONDS = 0.12


def check(name: str, actual: Tensor, expected: Tensor) -> None:
    error = ((actual - expected).norm() / expected.norm()).item()
    if not error < ERROR:
        raise ValueError(f"{name}: an error of {error:.2e}")


def rotated_reference(q: Tensor, cos_sin: Tensor) -> Tensor:
    cos, sin = cos_sin[:, None].chunk(2, -1)
    first, second = q.float().chunk(2, -1)
    rotated = torch.cat((first * cos - second * sin, second * cos + first * sin), -1)
    return turned(rotated).clamp(-FP8_MAX, FP8_MAX)


class Inputs:
    """Several of each, more than the L2 cache holds."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.rows = [self._random(HIDDEN) for _ in range(3)]
        self.gate_up = [self._random(2 * INTERMEDIATE) for _ in range(2)]
        self.scales = (
            torch.rand(NUM_ROWS, device="cuda") + 0.5,
            torch.rand(2 * INTERMEDIATE, device="cuda") + 0.5,
        )
        self.weight = torch.randn(HIDDEN, device="cuda", dtype=DTYPE)
        self.positions = torch.arange(NUM_ROWS, device="cuda")
        self.cos_sin = torch.randn(NUM_ROWS, HEAD_DIM, device="cuda")

    def _random(self, size: int) -> Tensor:
        return torch.randn(NUM_ROWS, size, device="cuda", dtype=DTYPE)

    def scaled_silu(self, x: Tensor) -> Fp8Rows:
        return activation.silu_and_mul_fp8(x, scale=None, scales=self.scales)

    def norm(self, x: Tensor) -> Fp8Rows:
        return norm.add_rms_norm_fp8(None, x, self.weight, EPS, scale=None)[0]

    def rotated(self, x: Tensor) -> Tensor:
        return rope.rotated_fp8(x.view(NUM_ROWS, HEADS, HEAD_DIM), self.cos_sin, self.positions)

    def check(self) -> None:
        x, gate_up = self.rows[0], self.gate_up[0]
        normed = rms_norm_reference(x, self.weight, EPS).float()
        check("norm", self.norm(x).dequantized(torch.float32), normed)
        quantized = fp8.quantize_rows(x, None).dequantized(torch.float32)
        check("quantize", quantized, quantize_rows_reference(x).dequantized(torch.float32))
        gated = activation.silu_and_mul_fp8(gate_up, scale=None).dequantized(torch.float32)
        expected = silu_and_mul_fp8_reference(gate_up).dequantized(torch.float32)
        check("silu", gated, expected)
        expected = silu_and_mul_fp8_reference(gate_up, scales=self.scales)
        check(
            "scaled silu",
            self.scaled_silu(gate_up).dequantized(torch.float32),
            expected.dequantized(torch.float32),
        )
        rotated = self.rotated(x)
        assert rotated.dtype is FP8
        heads = x.view(NUM_ROWS, HEADS, HEAD_DIM)
        check("rotate", rotated.float(), rotated_reference(heads, self.cos_sin))


def microseconds(call: Callable[[Tensor], object], inputs: list[Tensor]) -> float:
    calls: list[Any] = [functools.partial(call, x) for x in inputs]
    return round(1e6 * sustained_s(calls, SECONDS), 1)


def bench(inputs: Inputs) -> Iterator[dict[str, Any]]:
    for warps in (4, 8, 16, 32):
        with mock.patch.multiple(fp8, fp8_row_warps=lambda *_, w=warps: w):
            quantize_us = microseconds(lambda x: fp8.quantize_rows(x, None), inputs.rows)
        with mock.patch.multiple(norm, fp8_row_warps=lambda *_, w=warps: w):
            norm_us = microseconds(inputs.norm, inputs.rows)
        yield {"warps": warps, "norm_us": norm_us, "quantize_us": quantize_us}
    for chunk, elements in ((1024, 4), (2048, 4), (2048, 8), (4096, 8)):
        with mock.patch.multiple(activation, _CHUNK=chunk, _ELEMENTS=elements):
            silu_us = microseconds(
                lambda x: activation.silu_and_mul_fp8(x, scale=None), inputs.gate_up
            )
            scaled_us = microseconds(inputs.scaled_silu, inputs.gate_up)
        yield {
            "chunk": chunk,
            "elements": elements,
            "silu_us": silu_us,
            "scaled_silu_us": scaled_us,
        }
    for heads in (16, 32):
        for warps in (2, 4, 8):
            sizes = {"_QUERY_HEADS": heads, "_QUERY_WARPS": warps}
            with mock.patch.multiple(rope, **sizes):
                rotate_us = microseconds(inputs.rotated, inputs.rows)
            yield {"heads": heads, "warps": warps, "rotate_us": rotate_us}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--commit", default=current_commit(), help="where the machine has no git")
    args = parser.parse_args()
    inputs = Inputs()
    inputs.check()
    rows: list[dict[str, Any]] = []
    for row in bench(inputs):
        rows.append(row)
        print(json.dumps(row), flush=True)
    if args.out:
        results = {
            "date": time.strftime("%Y-%m-%d"),
            "commit": args.commit,
            "card": torch.cuda.get_device_name(),
            "rows": rows,
        }
        args.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
