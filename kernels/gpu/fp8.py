"""Quantization of rows to 8 bits, a row in one program."""

# What kernels call is compiled with them, whatever types its decorator has.
# pyright: reportGeneralTypeIssues=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.fp8 import FP8, FP8_MAX, Fp8Rows
from kernels.gpu.dependent_launch import (
    launch_options,
    let_successor_start,
    wait_for_predecessor,
)
from kernels.gpu.launching import launch
from kernels.gpu.sizes import next_power_of_2

LARGEST = tl.constexpr(FP8_MAX)
ROOT_2 = tl.constexpr(2**0.5)
SMALLEST_SCALE = tl.constexpr(1e-12 / FP8_MAX)
# Far beyond a decode step's tokens, where a row's time counts, and below a prompt step's.
_MANY_TOKENS = 1024


@triton.jit
def quantize(values, axis: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    """Float32 `values` in 8 bits, and their scales along `axis`, which is kept with length 1."""
    scale = tl.max(tl.abs(values), axis=axis, keep_dims=True) / LARGEST
    scale = tl.maximum(scale, SMALLEST_SCALE)
    return (values * (1.0 / scale)).to(tl.float8e4nv), scale


@triton.jit
def _row_scale(chunks):
    """That of `kernels.fp8.quantize_rows` for a row in chunks: [1]."""
    largest = tl.abs(chunks[0])
    for i in tl.static_range(1, len(chunks)):
        largest = tl.maximum(largest, tl.abs(chunks[i]))
    scale = tl.maximum(tl.max(largest, 0, keep_dims=True) / LARGEST, SMALLEST_SCALE)
    difference = tl.zeros_like(chunks[0])
    for i in tl.static_range(len(chunks)):
        scaled = chunks[i] * (1.0 / scale)
        error = scaled - scaled.to(tl.float8e4nv).to(tl.float32)
        other_error = scaled - ROOT_2 * (scaled * (1.0 / ROOT_2)).to(tl.float8e4nv).to(tl.float32)
        difference += error * error - other_error * other_error
    return tl.where(tl.sum(difference, 0, keep_dims=True) > 0.0, scale * ROOT_2, scale)


@triton.jit
def store_fp8_row(chunks, out, scales, static_scale, row, size) -> None:
    """Stores a row's float32 values, a tuple of chunks of one length, which are 0 past `size`."""
    columns = tl.arange(0, chunks[0].shape[0])
    scale = _row_scale(chunks) if static_scale is None else tl.load(static_scale + tl.arange(0, 1))
    tl.store(scales + row + tl.arange(0, 1), scale)
    for i in tl.static_range(len(chunks)):
        # Rounded again: to keep what was tried would need more registers.
        scaled = chunks[i] * (1.0 / scale)
        if static_scale is not None:
            scaled = tl.minimum(tl.maximum(scaled, -LARGEST), LARGEST)
        tl.store(out + row * size + columns, scaled.to(tl.float8e4nv), mask=columns < size)
        columns += chunks[0].shape[0]


@triton.jit
def _quantize_rows_kernel(
    x,
    out,
    scales,
    static_scale,
    size,
    x_stride,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_predecessor(PDL)
    let_successor_start(PDL)
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    values = tl.load(x + row * x_stride + columns, mask=columns < size, other=0.0).to(tl.float32)
    store_fp8_row((values,), out, scales, static_scale, row, size)


@triton.jit
def _saturate_rows_kernel(x, out, size, x_stride, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    mask = columns < size
    values = tl.load(x + row * x_stride + columns, mask=mask).to(tl.float32)
    values = tl.clamp(values, -LARGEST, LARGEST, propagate_nan=tl.PropagateNan.ALL)
    tl.store(out + row * size + columns, values.to(tl.float8e4nv), mask=mask)


def empty_rows(num_rows: int, size: int, device: torch.device) -> Fp8Rows:
    return Fp8Rows(
        torch.empty((num_rows, size), dtype=FP8, device=device),
        torch.empty(num_rows, dtype=torch.float32, device=device),
    )


def quantize_rows(x: Tensor, scale: Tensor | None) -> Fp8Rows:
    """`kernels.fp8.quantize_rows` for `x` whose rows are contiguous."""
    num_rows, size = x.shape
    out = empty_rows(num_rows, size, x.device)
    block = next_power_of_2(size)
    if num_rows:
        launch(_quantize_rows_kernel, (num_rows,))(
            x,
            out.values,
            out.scales,
            scale,
            size,
            x.stride(0),
            BLOCK=block,
            num_warps=fp8_row_warps(block, num_rows),
            **launch_options(x.device),
        )
    return out


def saturate_rows(x: Tensor) -> Tensor:
    """`x` in 8 bits without a scale, what is beyond their range as its ends, contiguous. A row's
    elements, all but the first dimension, are contiguous."""
    num_rows, size = len(x), x[0].numel()
    out = torch.empty(x.shape, dtype=FP8, device=x.device)
    block = next_power_of_2(size)
    launch(_saturate_rows_kernel, (num_rows,))(
        x, out, size, x.stride(0), BLOCK=block, num_warps=fp8_row_warps(block, num_rows)
    )
    return out


def row_warps(block: int) -> int:
    """Eight elements a thread keep loads at 16 bytes each."""
    return max(1, min(block // 256, 16))


def fp8_row_warps(block: int, num_rows: int) -> int:
    """`row_warps` where rows are few; where they are many, and wait for threads, 32 elements a
    thread are faster (benchmarks/gpu/rows.py)."""
    return row_warps(block) if num_rows < _MANY_TOKENS else max(1, min(block // 1024, 16))
