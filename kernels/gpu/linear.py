"""Linear layers of few tokens: the weight is read once, as fast as the memory gives it.

The weight's rows are the large side of the matrix instruction, the tokens its small side. Where
there are too few tiles of rows to fill the card, the inner dimension is split over programs; the
last one of a tile to finish adds up what the others left, in a fixed order, so results don't vary.
"""

# What kernels call is compiled with them, whatever types its decorator has.
# pyright: reportGeneralTypeIssues=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.fp8 import Fp8Rows
from kernels.gpu.arrivals import arrival_counters
from kernels.gpu.dependent_launch import (
    LINE_BITS,
    launch_options,
    let_successor_start,
    prefetch_to_l2,
    wait_for_predecessor,
)
from kernels.gpu.fp8 import quantize
from kernels.gpu.launching import launch
from kernels.gpu.linear_tiles import LinearTile, fp8_tile_for, tile_for
from kernels.gpu.sizes import ceil_div, next_power_of_2

_MIN_TOKENS = 16


@triton.jit
def _load_x(x, tokens, columns, x_stride, num_tokens, in_features, IS_EVEN: tl.constexpr):
    """[INNER, TOKENS] of `x`, zeros where there is nothing."""
    mask = tokens[None, :] < num_tokens
    if not IS_EVEN:
        mask &= columns[:, None] < in_features
    return tl.load(x + tokens[None, :] * x_stride + columns[:, None], mask=mask, other=0.0)


@triton.jit
def _load_weight(weight_rows, columns, in_features, IS_EVEN: tl.constexpr):
    """[ROWS, INNER] of the weight."""
    if IS_EVEN:
        return tl.load(weight_rows + columns[None, :])
    return tl.load(weight_rows + columns[None, :], mask=columns[None, :] < in_features, other=0.0)


@triton.jit
def _add_product(w, values, sums, SUMMED: tl.constexpr):
    """Inputs of 16 bits are quantized for weights of 8, with a scale for each token and tile."""
    if w.dtype != values.dtype:
        quantized, scale = quantize(values.to(tl.float32), axis=0)
        sums += tl.dot(w, quantized, max_num_imprecise_acc=SUMMED) * scale
    elif w.dtype.primitive_bitwidth == 8:
        sums = tl.dot(w, values, sums, max_num_imprecise_acc=SUMMED)
    else:
        sums = tl.dot(w, values, sums, input_precision="ieee")
    return sums


@triton.jit
def _finished(sums, weight_scales, bias, rows, is_row):
    """Scales and bias of output channels."""
    if weight_scales is not None:
        sums *= tl.load(weight_scales + rows, mask=is_row, other=0.0)[:, None]
    if bias is not None:
        sums += tl.load(bias + rows, mask=is_row, other=0.0).to(tl.float32)[:, None]
    return sums


@triton.jit(do_not_specialize=["num_tokens"])
def _linear_kernel(
    x,
    x_scales,
    weight,
    weight_scales,
    bias,
    residual,
    out,
    partial,
    arrivals,
    num_tokens,
    out_features,
    in_features,
    x_stride,
    ROWS: tl.constexpr,
    INNER: tl.constexpr,
    TOKENS: tl.constexpr,
    SPLITS: tl.constexpr,
    SUMMED: tl.constexpr,
    PREFETCHED: tl.constexpr,
    IS_GATED: tl.constexpr,
    IS_EVEN: tl.constexpr,
    PDL: tl.constexpr,
):
    row_tile = tl.program_id(0)
    split = tl.program_id(1)
    rows = row_tile * ROWS + tl.arange(0, ROWS)
    tokens = tl.arange(0, TOKENS)
    inner = tl.arange(0, INNER)
    is_row = rows < out_features
    num_tiles = tl.cdiv(in_features, INNER)
    tiles_per_split = tl.cdiv(num_tiles, SPLITS)
    first = split * tiles_per_split
    last = tl.minimum(first + tiles_per_split, num_tiles)
    # Rows past the end are read again from the last one, and not stored.
    weight_rows = weight + tl.minimum(rows, out_features - 1).to(tl.int64)[:, None] * in_features
    up_rows = weight_rows + tl.cast(out_features, tl.int64) * in_features
    if PDL and IS_EVEN:
        # Nobody writes weights: their first tiles are on the way while the predecessor ends.
        line: tl.constexpr = LINE_BITS // weight.dtype.element_ty.primitive_bitwidth
        lines = first * INNER + tl.arange(0, INNER // line) * line
        for ahead in tl.static_range(PREFETCHED):
            at = tl.minimum(lines + ahead * INNER, in_features - line)
            prefetch_to_l2(weight_rows + at[None, :])
            if IS_GATED:
                prefetch_to_l2(up_rows + at[None, :])
    wait_for_predecessor(PDL)
    let_successor_start(PDL)
    sums = tl.zeros([ROWS, TOKENS], tl.float32)
    up_sums = tl.zeros([ROWS, TOKENS], tl.float32)
    for tile in range(first, last):
        columns = tile * INNER + inner
        w = _load_weight(weight_rows, columns, in_features, IS_EVEN)
        values = _load_x(x, tokens, columns, x_stride, num_tokens, in_features, IS_EVEN)
        sums = _add_product(w, values, sums, SUMMED)
        if IS_GATED:
            up = _load_weight(up_rows, columns, in_features, IS_EVEN)
            up_sums = _add_product(up, values, up_sums, SUMMED)
    out_at = tokens[None, :] * out_features + rows[:, None]
    mask = is_row[:, None] & (tokens < num_tokens)[None, :]
    if SPLITS > 1:
        size = num_tokens * out_features
        tl.store(partial + split * size + out_at, sums, mask=mask)
        # Every thread's partial sums are written before the one that counts says so.
        tl.debug_barrier()
        arrived = tl.atomic_add(arrivals + row_tile, 1, sem="acq_rel")
        if arrived < SPLITS - 1:
            return
        tl.debug_barrier()
        sums = tl.zeros([ROWS, TOKENS], tl.float32)
        for other in range(SPLITS):
            sums += tl.load(
                partial + other * size + out_at, mask=mask, other=0.0, cache_modifier=".cg"
            )
        tl.store(arrivals + row_tile, 0)
    if x_scales is not None:
        token_scales = tl.load(x_scales + tokens, mask=tokens < num_tokens, other=0.0)[None, :]
        sums *= token_scales
        up_sums *= token_scales
    sums = _finished(sums, weight_scales, bias, rows, is_row)
    if IS_GATED:
        up_sums = _finished(up_sums, weight_scales, bias, rows + out_features, is_row)
        sums = sums * tl.sigmoid(sums) * up_sums
    if residual is not None:
        sums += tl.load(residual + out_at, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + out_at, sums, mask=mask)


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    residual: Tensor | None = None,
    tile: LinearTile | None = None,
) -> Tensor:
    """`x @ weight.T + bias` for at most `MAX_TOKENS` rows of `x`, contiguous in the last dimension.

    All are of one type of 16 bits. `weight` is [out_features, in_features], contiguous. The result
    is added to `residual`, in place, if there is one. `tile` is for benchmarks.
    """
    tile = tile or tile_for(x.shape[0], *weight.shape)
    return _launch(x, None, weight, None, bias, residual, dtype=x.dtype, gated=False, tile=tile)


def fp8_linear(
    x: Tensor | Fp8Rows,
    weight: Fp8Rows,
    bias: Tensor | None,
    *,
    dtype: torch.dtype,
    residual: Tensor | None = None,
    gated: bool = False,
    tile: LinearTile | None = None,
) -> Tensor:
    """`linear` with a weight of 8 bits, and `x` of 8 or 16, to a result in `dtype`.

    If it is `gated`, the weight's first half are the gates of the second: the result is
    `silu(gate) * up`, half as wide.
    """
    values, scales = (x.values, x.scales) if isinstance(x, Fp8Rows) else (x, None)
    shape = (values.shape[0], *weight.values.shape)
    tile = tile or fp8_tile_for(*shape, gated=gated, device=values.device)
    return _launch(
        values,
        scales,
        weight.values,
        weight.scales,
        bias,
        residual,
        dtype=dtype,
        gated=gated,
        tile=tile,
    )


def _launch(
    x: Tensor,
    x_scales: Tensor | None,
    weight: Tensor,
    weight_scales: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    *,
    dtype: torch.dtype,
    gated: bool,
    tile: LinearTile,
) -> Tensor:
    num_tokens, in_features = x.shape
    out_features = weight.shape[0] // 2 if gated else weight.shape[0]
    out = residual
    if out is None:
        out = torch.empty((num_tokens, out_features), dtype=dtype, device=x.device)
    partial, arrivals = out, out
    num_row_tiles = ceil_div(out_features, tile.rows)
    if tile.splits > 1:
        if gated:
            raise ValueError("a gated product is not split")
        shape = (tile.splits, num_tokens, out_features)
        partial = torch.empty(shape, dtype=torch.float32, device=x.device)
        arrivals = arrival_counters(num_row_tiles, x.device)
    launch(_linear_kernel, (num_row_tiles, tile.splits))(
        x,
        x_scales,
        weight,
        weight_scales,
        bias,
        residual,
        out,
        partial,
        arrivals,
        num_tokens,
        out_features,
        in_features,
        x.stride(0),
        ROWS=tile.rows,
        INNER=tile.inner,
        TOKENS=max(_MIN_TOKENS, next_power_of_2(num_tokens)),
        SPLITS=tile.splits,
        SUMMED=min(tile.summed, tile.inner),
        PREFETCHED=tile.prefetched,
        IS_GATED=gated,
        IS_EVEN=in_features % tile.inner == 0,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        **launch_options(x.device),
    )
    return out
