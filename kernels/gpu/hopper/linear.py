"""Products of 8- or 16-bit numbers for some dozens to some hundreds of tokens.

A warp loads and some warpgroups multiply. Programs stay, and share out the units, each of which is
a tile of the result or, where there are too few of those to fill the card, a part of its sum.
"""

# Gluon's compiler gives kernels their types, not Python.
# pyright: reportCallIssue=false, reportAssignmentType=false, reportGeneralTypeIssues=false

import functools

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from kernels.fp8 import Fp8Rows
from kernels.gpu.cards import num_multiprocessors
from kernels.gpu.dependent_launch import launch_options
from kernels.gpu.hopper.linear_loading import load
from kernels.gpu.hopper.linear_tiles import LOADING_REGISTERS, HopperTile
from kernels.gpu.hopper.multiplying import MAX_SPLITS, multiply
from kernels.gpu.launching import launch
from kernels.gpu.sizes import ceil_div

# Counters of a device's tiles that are summed in parts.
_NUM_COUNTERS = 1 << 16


@gluon.jit(
    do_not_specialize=[
        "num_tokens", "num_units", "num_tiles", "num_token_tiles", "num_steps", "splits",
        "merged",
    ]
)  # fmt: skip
def _hopper_linear_kernel(
    row_desc,
    column_desc,
    out,
    row_scales,
    column_scales,
    bias,
    partial,
    arrivals,
    num_tokens,
    out_features,
    num_units,
    num_tiles,
    num_token_tiles,
    num_steps,
    splits,
    merged,
    TOKENS_ARE_ROWS: gl.constexpr,
    ROWS: gl.constexpr,
    COLUMNS: gl.constexpr,
    INNER: gl.constexpr,
    ELEMENT_BYTES: gl.constexpr,
    WARPGROUPS: gl.constexpr,
    STAGES: gl.constexpr,
    PROMOTED: gl.constexpr,
    IS_SPLIT: gl.constexpr,
    HAS_SCALES: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    HAS_RESIDUAL: gl.constexpr,
    MULTIPLYING_REGISTERS: gl.constexpr,
    LOADING_REGISTERS: gl.constexpr,
    PDL: gl.constexpr,
):
    plain: gl.constexpr = mbarrier.MBarrierLayout()
    row_tiles = gl.allocate_shared_memory(
        row_desc.dtype, [STAGES * WARPGROUPS, ROWS, INNER], row_desc.layout
    )
    column_tiles = gl.allocate_shared_memory(
        column_desc.dtype, [STAGES, COLUMNS, INNER], column_desc.layout
    )
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], plain)
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], plain)
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=WARPGROUPS)
    buffers = (row_tiles, column_tiles)
    barriers = (full, empty)
    units = (num_units, num_tiles, num_token_tiles, num_steps, splits)
    work = (
        out, (row_scales, column_scales), bias, (partial, arrivals, merged), buffers, barriers,
        num_tokens, out_features, units,
    )  # fmt: skip
    if WARPGROUPS == 1:
        gl.warp_specialize(
            [
                (
                    multiply,
                    (
                        0, work, TOKENS_ARE_ROWS, ROWS, COLUMNS, ELEMENT_BYTES, WARPGROUPS, STAGES,
                        PROMOTED, IS_SPLIT, HAS_SCALES, HAS_BIAS, HAS_RESIDUAL, PDL,
                    ),
                ),
                (
                    load,
                    (
                        row_desc, column_desc, buffers, barriers, units, TOKENS_ARE_ROWS, ROWS,
                        COLUMNS, INNER, ELEMENT_BYTES, WARPGROUPS, STAGES, PDL,
                    ),
                ),
            ],
            [1],
            [LOADING_REGISTERS],
        )  # fmt: skip
    elif WARPGROUPS == 2:
        gl.warp_specialize(
            [
                (
                    multiply,
                    (
                        0, work, TOKENS_ARE_ROWS, ROWS, COLUMNS, ELEMENT_BYTES, WARPGROUPS, STAGES,
                        PROMOTED, IS_SPLIT, HAS_SCALES, HAS_BIAS, HAS_RESIDUAL, PDL,
                    ),
                ),
                (
                    multiply,
                    (
                        1, work, TOKENS_ARE_ROWS, ROWS, COLUMNS, ELEMENT_BYTES, WARPGROUPS, STAGES,
                        PROMOTED, IS_SPLIT, HAS_SCALES, HAS_BIAS, HAS_RESIDUAL, PDL,
                    ),
                ),
                (
                    load,
                    (
                        row_desc, column_desc, buffers, barriers, units, TOKENS_ARE_ROWS, ROWS,
                        COLUMNS, INNER, ELEMENT_BYTES, WARPGROUPS, STAGES, PDL,
                    ),
                ),
            ],
            [4, 1],
            [MULTIPLYING_REGISTERS, LOADING_REGISTERS],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (
                    multiply,
                    (
                        0, work, TOKENS_ARE_ROWS, ROWS, COLUMNS, ELEMENT_BYTES, WARPGROUPS, STAGES,
                        PROMOTED, IS_SPLIT, HAS_SCALES, HAS_BIAS, HAS_RESIDUAL, PDL,
                    ),
                ),
                (
                    multiply,
                    (
                        1, work, TOKENS_ARE_ROWS, ROWS, COLUMNS, ELEMENT_BYTES, WARPGROUPS, STAGES,
                        PROMOTED, IS_SPLIT, HAS_SCALES, HAS_BIAS, HAS_RESIDUAL, PDL,
                    ),
                ),
                (
                    multiply,
                    (
                        2, work, TOKENS_ARE_ROWS, ROWS, COLUMNS, ELEMENT_BYTES, WARPGROUPS, STAGES,
                        PROMOTED, IS_SPLIT, HAS_SCALES, HAS_BIAS, HAS_RESIDUAL, PDL,
                    ),
                ),
                (
                    load,
                    (
                        row_desc, column_desc, buffers, barriers, units, TOKENS_ARE_ROWS, ROWS,
                        COLUMNS, INNER, ELEMENT_BYTES, WARPGROUPS, STAGES, PDL,
                    ),
                ),
            ],
            [4, 4, 1],
            [MULTIPLYING_REGISTERS, MULTIPLYING_REGISTERS, LOADING_REGISTERS],
        )  # fmt: skip


def hopper_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    tile: HopperTile,
    residual: Tensor | None = None,
) -> Tensor:
    """`kernels.gpu.linear.linear` on Hopper, of numbers of 16 bits.

    `weight` is contiguous, `x` in its rows. The result is added to `residual`, in place, if there
    is one.
    """
    return _launch(x, weight, None, bias, residual, dtype=x.dtype, tile=tile)


def hopper_fp8_linear(
    x: Fp8Rows,
    weight: Fp8Rows,
    bias: Tensor | None,
    *,
    dtype: torch.dtype,
    tile: HopperTile,
    residual: Tensor | None = None,
) -> Tensor:
    """`hopper_linear` of 8-bit numbers, to a result in `dtype`."""
    scales = (x.scales, weight.scales)
    return _launch(x.values, weight.values, scales, bias, residual, dtype=dtype, tile=tile)


def _launch(
    x: Tensor,
    weight: Tensor,
    scales: tuple[Tensor, Tensor] | None,
    bias: Tensor | None,
    residual: Tensor | None,
    *,
    dtype: torch.dtype,
    tile: HopperTile,
) -> Tensor:
    num_tokens, in_features = x.shape
    out_features = weight.shape[0]
    out = residual
    if out is None:
        out = torch.empty((num_tokens, out_features), dtype=dtype, device=x.device)
    inner = tile.inner_bytes // x.element_size()
    num_steps = ceil_div(in_features, inner)
    splits = min(tile.splits, num_steps)
    num_token_tiles = ceil_div(num_tokens, tile.tokens)
    num_tiles = num_token_tiles * ceil_div(out_features, tile.features)
    num_units = num_tiles * splits
    partial, arrivals = out, out
    if splits > 1:
        num_parts = num_tiles * tile.warpgroups
        shape = (splits, num_parts, tile.rows, tile.columns)
        partial = torch.empty(shape, dtype=torch.float32, device=out.device)
        arrivals = _counters(out.device)
        if splits > MAX_SPLITS.value or num_parts * MAX_SPLITS.value > len(arrivals):
            raise ValueError(f"{splits} splits of {num_parts} tiles are too many")
    x_rows, weight_rows = tile.rows, tile.columns
    if not tile.tokens_are_rows:
        x_rows, weight_rows = weight_rows, x_rows
    x_scales, weight_scales = (out, out) if scales is None else scales
    operands = [
        (_descriptor(x, x_rows, inner), x_scales),
        (_descriptor(weight, weight_rows, inner), weight_scales),
    ]
    if not tile.tokens_are_rows:
        operands.reverse()
    (rows, row_scales), (columns, column_scales) = operands
    num_programs = min(num_units, num_multiprocessors(out.device) * tile.programs)
    launch(_hopper_linear_kernel, (num_programs,))(
        rows,
        columns,
        out,
        row_scales,
        column_scales,
        out if bias is None else bias,
        partial,
        arrivals,
        num_tokens,
        out_features,
        num_units,
        num_tiles,
        num_token_tiles,
        num_steps,
        splits,
        tile.merged,
        TOKENS_ARE_ROWS=tile.tokens_are_rows,
        ROWS=tile.rows,
        COLUMNS=tile.columns,
        INNER=inner,
        ELEMENT_BYTES=x.element_size(),
        WARPGROUPS=tile.warpgroups,
        STAGES=tile.stages,
        PROMOTED=tile.promoted,
        IS_SPLIT=splits > 1,
        HAS_SCALES=scales is not None,
        HAS_BIAS=bias is not None,
        HAS_RESIDUAL=residual is not None,
        MULTIPLYING_REGISTERS=tile.multiplying_registers,
        LOADING_REGISTERS=LOADING_REGISTERS,
        num_warps=4,
        maxnreg=tile.registers,
        **launch_options(out.device),
    )
    return out


def _descriptor(values: Tensor, rows: int, inner: int) -> TensorDescriptor:
    return TensorDescriptor(
        values,
        shape=list(values.shape),
        strides=[values.stride(0), 1],
        block_shape=[rows, inner],
        # Lines of 128 bytes, swizzled as the matrix instructions read them.
        layout=gl.NVMMASharedLayout(128, 8 * values.element_size(), 2),
    )


@functools.cache
def _counters(device: torch.device) -> Tensor:
    """Zero between calls: kernels on one stream take turns with them."""
    return torch.zeros(_NUM_COUNTERS, dtype=torch.int32, device=device)
