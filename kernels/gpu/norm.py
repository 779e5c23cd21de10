"""RMS normalisation, a row in one program; the rows of a step are few and short."""

# A launch takes compile options beside the kernel's arguments.
# pyright: reportCallIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.gpu.dependent_launch import (
    launch_options,
    let_successor_start,
    wait_for_predecessor,
)
from kernels.gpu.sizes import next_power_of_2


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
def _add_rms_norm_kernel(x, residual, weight, size, eps, BLOCK: tl.constexpr, PDL: tl.constexpr):
    wait_for_predecessor(PDL)
    let_successor_start(PDL)
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    mask = columns < size
    start = row * size
    added = tl.load(x + start + columns, mask=mask, other=0.0).to(tl.float32)
    stream = tl.load(residual + start + columns, mask=mask, other=0.0).to(tl.float32)
    # Rounded before it is normalised, as the residual stream is stored.
    stream = (stream + added).to(residual.dtype.element_ty)
    tl.store(residual + start + columns, stream, mask=mask)
    values = stream.to(tl.float32)
    scale = tl.rsqrt(tl.sum(values * values) / size + eps)
    gain = tl.load(weight + columns, mask=mask, other=0.0).to(tl.float32)
    tl.store(x + start + columns, values * scale * gain, mask=mask)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`kernels.norm.rms_norm` for `x` of at most three dimensions with a contiguous last one."""
    size = weight.shape[0]
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    block = next_power_of_2(size)
    inner = x.shape[1] if x.dim() > 2 else 1
    if x.numel():
        _rms_norm_kernel[(x.numel() // size,)](
            x,
            weight,
            out,
            inner,
            x.stride(0) if x.dim() > 1 else 0,
            x.stride(1) if x.dim() > 2 else 0,
            size,
            eps,
            BLOCK=block,
            num_warps=_num_warps(block),
            **launch_options(x.device),
        )
    return out


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`kernels.norm.add_rms_norm` in place, for contiguous `x` and `residual`."""
    size = weight.shape[0]
    block = next_power_of_2(size)
    if x.numel():
        _add_rms_norm_kernel[(x.numel() // size,)](
            x,
            residual,
            weight,
            size,
            eps,
            BLOCK=block,
            num_warps=_num_warps(block),
            **launch_options(x.device),
        )
    return x, residual


def _num_warps(block: int) -> int:
    """Eight elements a thread keep loads at 16 bytes each."""
    return max(1, min(block // 256, 16))
