"""Whether matrix products are right on the share of a GPU that MPS leaves a process.

NVIDIA's products of 8-bit numbers were seen to return wrong sums, and no error, where a process may
use some of an H100's multiprocessors only (docs/performance.md). A worker that runs so compares a
few products of its model's sizes with sums in float32 before it serves.
"""

import os
from collections.abc import Callable

import torch
from torch import Tensor

from engine.models.config import ModelConfig
from kernels.fp8 import FP8, Fp8Rows
from kernels.fp8_linear import (
    Fp8Linear,
    add_fp8_linear,
    fits_fp8,
    fp8_linear,
    multiplies_fp8,
    unscaled_sums,
)
from protocol.errors import StartupError

_VARIABLE = "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE"
_NUM_TOKENS = (100, 300, 512, 1000, 1024, 2048, 4096, 8192)
# Rounding to bfloat16 is 0.003 of a result's norm, a wrong tile of a hundred 0.1.
_MAX_ERROR = 0.02

Shape = tuple[int, int]
"""out_features, in_features."""
Product = Callable[[Tensor, Tensor], Tensor]
"""[num_tokens, in_features] and [out_features, in_features] to [num_tokens, out_features]."""


def check_products_under_mps(config: ModelConfig, dtype: torch.dtype, device: torch.device) -> None:
    """Does nothing for a process that may use the whole of its GPU. Raises StartupError."""
    percentage = os.environ.get(_VARIABLE)
    if device.type != "cuda" or percentage in (None, "100"):
        return
    shapes = _layer_shapes(config)
    # Those that add to the residual stream.
    hidden = config.hidden_size
    adding = [shape for shape in shapes if shape[0] == hidden]
    products: list[tuple[str, Product, list[Shape]]] = [
        ("", torch.nn.functional.linear, shapes),
        ("adding ", _added_product, adding),
    ]
    if config.quantization is not None and multiplies_fp8(device, dtype):
        products += [
            ("fp8 ", _fp8_product, shapes),
            ("adding fp8 ", _added_fp8_product, adding),
            ("unscaled fp8 ", _unscaled_fp8_product, [(2 * config.intermediate_size, hidden)]),
        ]
    for kind, product, its_shapes in products:
        wrong = wrong_product(its_shapes, product, dtype, device)
        if wrong is not None:
            raise StartupError(
                f"With {percentage} % of the GPU's multiprocessors the library's {kind}products "
                f"are wrong ({wrong}); use all of them: --mps-prefill-percentage 100."
            )


def wrong_product(
    shapes: list[Shape], product: Product, dtype: torch.dtype, device: torch.device
) -> str | None:
    """The sizes of the first of these products that comes out wrong; None if all are right."""
    generator = torch.Generator(device).manual_seed(0)
    for out_features, in_features in shapes:
        weight = _random((out_features, in_features), dtype, generator)
        for num_tokens in _NUM_TOKENS:
            x = _random((num_tokens, in_features), dtype, generator)
            actual, expected = product(x, weight).float(), x.float() @ weight.float().T
            # Not a number is wrong, too.
            if not (actual - expected).norm() <= _MAX_ERROR * expected.norm():
                return f"{num_tokens} x {in_features} by {out_features}"
    return None


def _layer_shapes(config: ModelConfig) -> list[Shape]:
    """Of a layer's linears."""
    heads = config.num_heads * config.head_dim
    kv_heads = config.num_kv_heads * config.head_dim
    hidden, mlp = config.hidden_size, config.intermediate_size
    return [(heads + 2 * kv_heads, hidden), (hidden, heads), (2 * mlp, hidden), (hidden, mlp)]


def _added_product(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_zeros((len(x), len(weight))).addmm_(x, weight.T)


def _fp8_product(x: Tensor, weight: Tensor) -> Tensor:
    if not fits_fp8(*weight.shape):
        return torch.nn.functional.linear(x, weight)
    return fp8_linear(_fp8_rows(x), Fp8Linear(_fp8_rows(weight), None, None), dtype=x.dtype)


def _added_fp8_product(x: Tensor, weight: Tensor) -> Tensor:
    if fits_fp8(*weight.shape):
        out = x.new_zeros((len(x), len(weight)))
        if add_fp8_linear(_fp8_rows(x), Fp8Linear(_fp8_rows(weight), None, None), out):
            return out
    return _fp8_product(x, weight)


def _unscaled_fp8_product(x: Tensor, weight: Tensor) -> Tensor:
    out = unscaled_sums(_fp8_rows(x), _fp8_rows(weight)) if fits_fp8(*weight.shape) else None
    return _fp8_product(x, weight) if out is None else out


def _fp8_rows(x: Tensor) -> Fp8Rows:
    """Of numbers that 8 bits hold exactly, so that the result is as exact as any."""
    return Fp8Rows(x.to(FP8), torch.ones(len(x), device=x.device))


def _random(shape: tuple[int, int], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Whole numbers from -8 to 8, which every type holds."""
    integers = torch.randint(-8, 9, shape, generator=generator, device=generator.device)
    return integers.to(dtype)
