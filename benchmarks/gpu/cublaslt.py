"""Torch's products of 8-bit numbers and cuBLASLt's own, for `benchmarks.gpu.products --cublaslt`.

Rows "added" have what follows the output and down projections: torch's product and the norm that
adds, or the product that adds and the norm alone. Rows "choices" have each of the algorithms that
cuBLASLt thinks fastest, the first of which is torch's if both are asked alike; "unscaled" ones
leave scales to what comes next. All is timed for a second each, since the card's power binds.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu import correctness
from benchmarks.gpu.correctness import FP8_RESULT_ERROR, Check, sampled_rows
from benchmarks.gpu.graph_time import Call, sustained_s
from kernels.fp8 import Fp8Rows, quantize_rows
from kernels.gpu.cublaslt import Product, products
from kernels.gpu.cublaslt_shapes import Shape
from kernels.gpu.fp8_linear import library_linear
from kernels.norm import add_rms_norm_fp8

# (out_features, in_features) of a layer's projections.
LINEARS = {
    "qkv": (6144, 4096),
    "output": (4096, 4096),
    "gate_up": (28672, 4096),
    "down": (4096, 14336),
}
ADDED = ("output", "down")
ADDED_TOKENS = (2048, 16384)
CHOICES_TOKENS = 16384
UNSCALED_TOKENS = (2048, 4096, 8192, 16384)
NUM_CHOICES = 8
NUM_WEIGHTS = 4
EPS = 1e-5
DTYPE = torch.bfloat16


def bench(*, only_unscaled: bool) -> Iterator[dict[str, Any]]:
    for num_tokens in UNSCALED_TOKENS:
        yield Case("gate_up", num_tokens, has_scales=False).choices(adds=False)
    if only_unscaled:
        return
    for name in ADDED:
        for num_tokens in ADDED_TOKENS:
            yield Case(name, num_tokens).added()
    for name in LINEARS:
        yield Case(name, CHOICES_TOKENS).choices(adds=False)
    for name in ADDED:
        yield Case(name, CHOICES_TOKENS).choices(adds=True)


class Case:
    """A product's operands. The residual is as large as the product: one that's missing shows."""

    def __init__(self, name: str, num_tokens: int, *, has_scales: bool = True) -> None:
        """Without scales, cuBLASLt's products have none, and torch's ones."""
        torch.manual_seed(0)
        self._name, self._num_tokens, self._has_scales = name, num_tokens, has_scales
        self._out_features, self._in_features = LINEARS[name]
        self._x = self._rows_of(num_tokens)
        self._weights = [self._rows_of(self._out_features) for _ in range(NUM_WEIGHTS)]
        self._residual = _random(num_tokens, self._out_features) * self._in_features**0.5
        self._norm = torch.ones(self._out_features, device="cuda", dtype=DTYPE)
        self._rows = sampled_rows(num_tokens, torch.device("cuda"))
        self._expected = correctness.product(self._x, self._weights[0], self._rows)

    def added(self) -> dict[str, Any]:
        row = self._row("added")
        row["torch_error"] = self._check(adds=False)("torch's", self._library(self._weights[0]))
        stream, output = self._residual.clone(), self._library(self._weights[0])
        row["torch_us"] = _us(self._libraries)
        row["norm_that_adds_us"] = _us([functools.partial(self._normed, output, stream)] * 4)
        row["norm_us"] = _us([functools.partial(self._normed, None, stream)] * 4)
        row["torch_and_norm_us"] = _us(
            [
                lambda weight=weight: self._normed(self._library(weight), stream)
                for weight in self._weights
            ]
        )
        found = self._products(1, adds=True)
        row["cublaslt_adds"] = bool(found)
        if not found:
            return row
        product = found[0]
        row["cublaslt_error"] = self._checked("cuBLASLt's", product, adds=True)
        row["cublaslt_us"] = _us(self._calls(product, stream))
        row["cublaslt_and_norm_us"] = _us(
            [
                lambda call=call: (call(), self._normed(None, stream))
                for call in self._calls(product, stream)
            ]
        )
        saved_us = row["torch_and_norm_us"] - row["cublaslt_and_norm_us"]
        row["saved_us"] = round(saved_us, 1)
        return row

    def choices(self, *, adds: bool) -> dict[str, Any]:
        kind = "choices that add" if adds else "choices"
        row = self._row(kind if self._has_scales else f"unscaled {kind}")
        self._check(adds=False)("torch's", self._library(self._weights[0]))
        first_us = _us(self._libraries)
        found: list[dict[str, Any]] = []
        out = torch.empty_like(self._residual)
        for index, product in enumerate(self._products(NUM_CHOICES, adds=adds)):
            out.zero_()
            choice: dict[str, Any] = {
                "error": self._checked(f"choice {index}", product, adds=adds),
                "us": _us(self._calls(product, out)),
            }
            choice["tflops"] = self._tflops(choice["us"])
            found.append(choice | product.choices)
        # Once more: a card that gets warmer gets slower.
        row["torch_us"] = [first_us, _us(self._libraries)]
        row["torch_tflops"] = self._tflops(min(row["torch_us"]))
        row["choices"] = found
        return row

    def _rows_of(self, num_rows: int) -> Fp8Rows:
        rows = quantize_rows(_random(num_rows, self._in_features))
        return rows if self._has_scales else Fp8Rows(rows.values, torch.ones_like(rows.scales))

    def _row(self, kind: str) -> dict[str, Any]:
        return {"kind": kind, "linear": self._name, "tokens": self._num_tokens}

    @property
    def _libraries(self) -> list[Call]:
        return [functools.partial(self._library, weight) for weight in self._weights]

    def _library(self, weight: Fp8Rows) -> Tensor:
        return library_linear(self._x, weight, None, dtype=DTYPE)

    def _normed(self, x: Tensor | None, stream: Tensor) -> object:
        return add_rms_norm_fp8(x, stream, self._norm, EPS)

    def _products(self, most: int, *, adds: bool) -> Sequence[Product]:
        shape = Shape(
            self._num_tokens,
            self._out_features,
            self._in_features,
            has_bias=False,
            adds=adds,
            has_scales=self._has_scales,
        )
        return products(shape, self._residual.device, most)

    def _calls(self, product: Product, out: Tensor) -> list[Call]:
        return [functools.partial(_run, product, self._x, each, out) for each in self._weights]

    def _checked(self, name: str, product: Product, *, adds: bool) -> float:
        out = self._residual.clone()
        _run(product, self._x, self._weights[0], out)
        return self._check(adds=adds)(name, out)

    def _check(self, *, adds: bool) -> Check:
        expected = self._expected
        if adds:
            expected = expected + self._residual[self._rows].double()
        case = f"{self._name}, {self._num_tokens} tokens"
        return Check(case, expected, bound=FP8_RESULT_ERROR, rows=self._rows)

    def _tflops(self, us: float) -> int:
        return round(2 * self._num_tokens * self._out_features * self._in_features / us / 1e6)


def _random(*shape: int) -> Tensor:
    return torch.randn(shape, device="cuda", dtype=DTYPE)


def _run(product: Product, x: Fp8Rows, weight: Fp8Rows, out: Tensor) -> None:
    if not product(x, weight, None, out):
        raise SystemExit(f"cuBLASLt refuses its own choice, {product.choices}")


def _us(calls: Sequence[Call]) -> float:
    return round(1e6 * sustained_s(calls), 1)
