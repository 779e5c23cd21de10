"""The gated activation: reads both halves once, writes their product."""

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
from kernels.gpu.fp8 import empty_rows, fp8_row_warps, store_fp8_row
from kernels.gpu.launching import launch
from kernels.gpu.sizes import ceil_div, next_power_of_2

_BLOCK = 1024
# The hardware's exponential is to base 2.
_MINUS_LOG2_E = tl.constexpr(-1.4426950408889634)


@triton.jit
def _gated(gate_up, row, columns, size):
    """`silu(gate) * up` of a row's `columns` in float32, 0 past its end."""
    mask = columns < size
    start = gate_up + row * 2 * size + columns
    gate = tl.load(start, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(start + size, mask=mask, other=0.0).to(tl.float32)
    # A root squared instead of the sigmoid's quotient, which has cases for divisors that these,
    # of 1 and more, are not.
    root = tl.rsqrt(1.0 + tl.exp2(gate * _MINUS_LOG2_E))
    return gate * up * root * root


@triton.jit
def _silu_and_mul_kernel(gate_up, out, size, BLOCK: tl.constexpr, PDL: tl.constexpr):
    wait_for_predecessor(PDL)
    let_successor_start(PDL)
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    values = _gated(gate_up, row, columns, size)
    tl.store(out + row * size + columns, values, mask=columns < size)


@triton.jit
def _silu_and_mul_fp8_kernel(
    gate_up,
    out,
    scales,
    static_scale,
    size,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_predecessor(PDL)
    let_successor_start(PDL)
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    values = _gated(gate_up, row, columns, size)
    store_fp8_row(values, out, scales, static_scale, row, size, columns)


def silu_and_mul(gate_up: Tensor) -> Tensor:
    """`kernels.activation.silu_and_mul` for a contiguous tensor."""
    num_tokens, size = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty((num_tokens, size), dtype=gate_up.dtype, device=gate_up.device)
    if num_tokens:
        launch(_silu_and_mul_kernel, (num_tokens, ceil_div(size, _BLOCK)))(
            gate_up,
            out,
            size,
            BLOCK=_BLOCK,
            num_warps=4,
            **launch_options(gate_up.device),
        )
    return out


def silu_and_mul_fp8(gate_up: Tensor, *, scale: Tensor | None) -> Fp8Rows:
    """`kernels.activation.silu_and_mul_fp8` for a contiguous tensor; a row in one program."""
    num_tokens, size = gate_up.shape[0], gate_up.shape[1] // 2
    out, block = empty_rows(num_tokens, size, gate_up.device), next_power_of_2(size)
    if num_tokens:
        launch(_silu_and_mul_fp8_kernel, (num_tokens,))(
            gate_up,
            out.values,
            out.scales,
            scale,
            size,
            BLOCK=block,
            num_warps=fp8_row_warps(block, num_tokens),
            **launch_options(gate_up.device),
        )
    return out
