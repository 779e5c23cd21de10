"""RMS normalisation, a row in one program; the rows of a step are few and short."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.fp8 import Fp8Rows
from kernels.gpu.dependent_launch import (
    launch_options,
    let_successor_start,
    wait_for_predecessor,
)
from kernels.gpu.fp8 import empty_rows, fp8_row_warps, row_warps, store_fp8_row
from kernels.gpu.launching import launch
from kernels.gpu.sizes import next_power_of_2


@triton.jit
def normalised(values, scale, weight, columns, mask, dtype: tl.constexpr):
    """Part of rows as `rms_norm` returns it, rounded to `dtype`; in float32 again."""
    gain = tl.load(weight + columns, mask=mask).to(tl.float32)
    return (values * scale * gain).to(dtype).to(tl.float32)


@triton.jit
def _rms_norm_kernel(
    x,
    weight,
    out,
    inner,
    outer_stride,
    inner_stride,
    size,
    eps,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_predecessor(PDL)
    let_successor_start(PDL)
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    mask = columns < size
    start = (row // inner) * outer_stride + (row % inner) * inner_stride
    values = tl.load(x + start + columns, mask=mask, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(values * values) / size + eps)
    gain = tl.load(weight + columns, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + row * size + columns, values * scale * gain, mask=mask)


@triton.jit
def _add_and_normalise(x, residual, weight, row, columns, size, eps):
    """Updates a row of the residual stream, and returns it normalised in float32."""
    mask = columns < size
    at = row * size + columns
    values = tl.load(residual + at, mask=mask, other=0.0).to(tl.float32)
    if x is not None:
        values += tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
        # Rounded before it is normalised, as the residual stream is stored.
        stream = values.to(residual.dtype.element_ty)
        tl.store(residual + at, stream, mask=mask)
        values = stream.to(tl.float32)
    scale = tl.rsqrt(tl.sum(values * values) / size + eps)
    gain = tl.load(weight + columns, mask=mask, other=0.0).to(tl.float32)
    return values * scale * gain


@triton.jit
def _add_rms_norm_kernel(x, residual, weight, size, eps, BLOCK: tl.constexpr, PDL: tl.constexpr):
    wait_for_predecessor(PDL)
    let_successor_start(PDL)
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    values = _add_and_normalise(x, residual, weight, row, columns, size, eps)
    tl.store(x + row * size + columns, values, mask=columns < size)


@triton.jit
def _add_rms_norm_fp8_kernel(
    x,
    residual,
    weight,
    out,
    scales,
    static_scale,
    size,
    eps,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_predecessor(PDL)
    let_successor_start(PDL)
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    values = _add_and_normalise(x, residual, weight, row, columns, size, eps)
    store_fp8_row((values,), out, scales, static_scale, row, size)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`kernels.norm.rms_norm` for `x` of at most three dimensions with a contiguous last one."""
    size = weight.shape[0]
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    block = next_power_of_2(size)
    inner = x.shape[1] if x.dim() > 2 else 1
    if x.numel():
        launch(_rms_norm_kernel, (x.numel() // size,))(
            x,
            weight,
            out,
            inner,
            x.stride(0) if x.dim() > 1 else 0,
            x.stride(1) if x.dim() > 2 else 0,
            size,
            eps,
            BLOCK=block,
            num_warps=row_warps(block),
            **launch_options(x.device),
        )
    return out


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`kernels.norm.add_rms_norm` in place, for contiguous `x` and `residual`."""
    size = weight.shape[0]
    block = next_power_of_2(size)
    if x.numel():
        launch(_add_rms_norm_kernel, (x.numel() // size,))(
            x,
            residual,
            weight,
            size,
            eps,
            BLOCK=block,
            num_warps=row_warps(block),
            **launch_options(x.device),
        )
    return x, residual


def add_rms_norm_fp8(
    x: Tensor | None, residual: Tensor, weight: Tensor, eps: float, *, scale: Tensor | None
) -> tuple[Fp8Rows, Tensor]:
    """`kernels.norm.add_rms_norm_fp8`, the residual in place, for contiguous inputs."""
    size = weight.shape[0]
    num_rows = residual.numel() // size
    out = empty_rows(num_rows, size, residual.device)
    block = next_power_of_2(size)
    if num_rows:
        launch(_add_rms_norm_fp8_kernel, (num_rows,))(
            x,
            residual,
            weight,
            out.values,
            out.scales,
            scale,
            size,
            eps,
            BLOCK=block,
            num_warps=fp8_row_warps(block, num_rows),
            **launch_options(residual.device),
        )
    return out, residual
