"""Linear layers over fp8 weights: our kernels for the tokens of a decode step, else cuBLASLt's, by
way of torch or, where it adds to the residual stream, without."""

import torch
from torch import Tensor

from kernels.fp8 import Fp8Rows
from kernels.fp8_linear import Fp8Linear, quantized
from kernels.gpu import cublaslt
from kernels.gpu import linear as few_tokens
from kernels.gpu.hopper import linear_tiles as hopper_tiles
from kernels.gpu.hopper.linear_tiles import HopperTile
from kernels.gpu.hopper.support import is_hopper
from kernels.gpu.linear_tiles import MAX_TOKENS, few_fp8_tokens


def fp8_linear(x: Tensor | Fp8Rows, packed: Fp8Linear, *, dtype: torch.dtype) -> Tensor:
    """`kernels.fp8_linear.fp8_linear` for shapes that are multiples of 16."""
    if _num_tokens(x) <= MAX_TOKENS:
        return few_tokens.fp8_linear(_input(x, packed), packed.weight, packed.bias, dtype=dtype)
    rows = quantized(x, packed)
    tile = _hopper_tile(x, packed)
    if tile is not None:
        return _hopper_linear(rows, packed, tile, dtype=dtype)
    return library_linear(rows, packed.weight, packed.bias, dtype=dtype)


def add_fp8_linear(x: Tensor | Fp8Rows, packed: Fp8Linear, residual: Tensor) -> bool:
    """`kernels.fp8_linear.add_fp8_linear`, which torch's product can't."""
    if _num_tokens(x) > MAX_TOKENS:
        tile = _hopper_tile(x, packed)
        if tile is None:
            return _library_adds(x, packed, residual)
        _hopper_linear(quantized(x, packed), packed, tile, dtype=residual.dtype, residual=residual)
        return True
    few_tokens.fp8_linear(
        _input(x, packed), packed.weight, packed.bias, dtype=residual.dtype, residual=residual
    )
    return True


def gates_at_once(x: Tensor | Fp8Rows) -> bool:
    """Whether `gated_fp8_linear` is faster than the product and then the gates."""
    return _are_few(x)


def gated_fp8_linear(x: Tensor | Fp8Rows, packed: Fp8Linear, *, dtype: torch.dtype) -> Tensor:
    """Output in `dtype`; for few tokens."""
    given = _input(x, packed)
    return few_tokens.fp8_linear(given, packed.weight, packed.bias, dtype=dtype, gated=True)


def unscaled_sums(x: Fp8Rows, weight: Fp8Rows) -> Tensor | None:
    """`kernels.fp8_linear.unscaled_sums`."""
    num_tokens, out_features = len(x.values), len(weight.values)
    product = cublaslt.unscaled_product(num_tokens, weight)
    if product is None:
        return None
    out = torch.empty((num_tokens, out_features), dtype=torch.bfloat16, device=x.values.device)
    return out if product(x, weight, None, out) else None


def library_linear(
    x: Fp8Rows, weight: Fp8Rows, bias: Tensor | None, *, dtype: torch.dtype
) -> Tensor:
    """torch's product of rows with scales, which writes bfloat16 alone."""
    out = torch._scaled_mm(  # noqa: SLF001  # pyright: ignore[reportPrivateImportUsage]
        x.values,
        weight.values.T,
        scale_a=x.scales[:, None],
        scale_b=weight.scales[None, :],
        out_dtype=torch.bfloat16,
        use_fast_accum=True,
    )
    if bias is not None:
        out += bias
    return out.to(dtype)


def _library_adds(x: Tensor | Fp8Rows, packed: Fp8Linear, residual: Tensor) -> bool:
    weight, bias = packed.weight, packed.bias
    # Asked before the input is quantized, which may be for nothing.
    product = cublaslt.adding_product(_num_tokens(x), weight, bias, residual)
    return product is not None and product(quantized(x, packed), weight, bias, residual)


def _input(x: Tensor | Fp8Rows, packed: Fp8Linear) -> Tensor | Fp8Rows:
    """What our kernel takes: for more than a few tokens, quantizing in each program costs more than
    a kernel of its own."""
    is_quantized_on_the_way = _are_few(x) and packed.input_scale is None
    return x if is_quantized_on_the_way else quantized(x, packed)


def _hopper_tile(x: Tensor | Fp8Rows, packed: Fp8Linear) -> HopperTile | None:
    tile = hopper_tiles.tile_for(_num_tokens(x), *packed.weight.values.shape)
    return tile if is_hopper(packed.weight.values.device) else None


def _hopper_linear(
    rows: Fp8Rows,
    packed: Fp8Linear,
    tile: HopperTile,
    *,
    dtype: torch.dtype,
    residual: Tensor | None = None,
) -> Tensor:
    # Imported on first use: not every Triton has Gluon.
    from kernels.gpu.hopper.linear import hopper_fp8_linear

    return hopper_fp8_linear(
        rows, packed.weight, packed.bias, dtype=dtype, tile=tile, residual=residual
    )


def _num_tokens(x: Tensor | Fp8Rows) -> int:
    return _values(x).shape[0]


def _are_few(x: Tensor | Fp8Rows) -> bool:
    return _num_tokens(x) <= few_fp8_tokens(_values(x).device)


def _values(x: Tensor | Fp8Rows) -> Tensor:
    return x.values if isinstance(x, Fp8Rows) else x
