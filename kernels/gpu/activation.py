"""The gated activation: reads both halves once, writes their product."""

# What kernels call is compiled with them, whatever types its decorator has.
# pyright: reportArgumentType=false

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
from kernels.gpu.fp8 import empty_rows, store_fp8_row
from kernels.gpu.launching import launch
from kernels.gpu.sizes import ceil_div, next_power_of_2

_BLOCK = 1024
# Of a row to 8 bits, which is kept in registers: elements of a chunk, and of it, each thread's.
_CHUNK, _ELEMENTS = 2048, 4
# So many registers a thread leave room for two programs of 512; and for so many chunks.
_TWO_PROGRAMS, _FEW_CHUNKS = 64, 8
# The hardware's exponential is to base 2.
_MINUS_LOG2_E = tl.constexpr(-1.4426950408889634)


@triton.jit
def _load_pair(gate_up, size, columns, mask, CACHE: tl.constexpr):
    """A row's `columns` of gate and up, 0 where `mask` isn't."""
    gate = tl.load(gate_up + columns, mask=mask, other=0.0, cache_modifier=CACHE)
    return gate, tl.load(gate_up + size + columns, mask=mask, other=0.0, cache_modifier=CACHE)


@triton.jit
def _gated(pair, size, columns, mask, row_scale, column_scales):
    """`silu(gate) * up` in float32. With `column_scales`, the pair still lacks these and the
    row's."""
    gate, up = pair[0].to(tl.float32), pair[1].to(tl.float32)
    # A root squared instead of the sigmoid's quotient, which has cases for divisors that these,
    # of 1 and more, are not. It takes the scales of the row's gate and up along.
    exponent_factor, inverse = _MINUS_LOG2_E, 1.0
    if column_scales is not None:
        gate *= tl.load(column_scales + columns, mask=mask, other=0.0)
        up *= tl.load(column_scales + size + columns, mask=mask, other=0.0)
        exponent_factor *= row_scale
        inverse /= row_scale * row_scale
    root = tl.rsqrt(inverse + inverse * tl.exp2(gate * exponent_factor))
    return gate * root * (up * root)


@triton.jit
def _silu_and_mul_kernel(gate_up, out, size, BLOCK: tl.constexpr, PDL: tl.constexpr):
    wait_for_predecessor(PDL)
    let_successor_start(PDL)
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < size
    pair = _load_pair(gate_up + row * 2 * size, size, columns, mask, "")
    values = _gated(pair, size, columns, mask, None, None)
    tl.store(out + row * size + columns, values, mask=mask)


@triton.jit
def _silu_and_mul_fp8_kernel(
    gate_up,
    row_scales,
    column_scales,
    out,
    scales,
    static_scale,
    size,
    CHUNK: tl.constexpr,
    NUM_CHUNKS: tl.constexpr,
    WHOLE_CHUNKS: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_predecessor(PDL)
    let_successor_start(PDL)
    row = tl.program_id(0).to(tl.int64)
    row_scale = None if row_scales is None else tl.load(row_scales + row)
    # Columns' scales are the same in each program: they alone are to stay in a multiprocessor's
    # cache. All of the row is on its way before the first of them is asked for.
    cache: tl.constexpr = "" if row_scales is None else ".cg"
    pairs = ()
    for i in tl.static_range(NUM_CHUNKS):
        columns = i * CHUNK + tl.arange(0, CHUNK)
        mask = (columns < size) | (i < WHOLE_CHUNKS)
        pair = _load_pair(gate_up + row * 2 * size, size, columns, mask, cache)
        pairs = pairs + (pair,)  # noqa: RUF005  (Triton has no unpacking)
    # Without it, the compiler puts loads off for want of registers.
    tl.debug_barrier()
    chunks = ()
    for i in tl.static_range(NUM_CHUNKS):
        columns = i * CHUNK + tl.arange(0, CHUNK)
        mask = (columns < size) | (i < WHOLE_CHUNKS)
        values = _gated(pairs[i], size, columns, mask, row_scale, column_scales)
        chunks = chunks + (values,)  # noqa: RUF005
    store_fp8_row(chunks, out, scales, static_scale, row, size)


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


def silu_and_mul_fp8(
    gate_up: Tensor, *, scale: Tensor | None, scales: tuple[Tensor, Tensor] | None = None
) -> Fp8Rows:
    """`kernels.activation.silu_and_mul_fp8` for a contiguous tensor; a row in one program."""
    num_tokens, size = gate_up.shape[0], gate_up.shape[1] // 2
    out, chunk = empty_rows(num_tokens, size, gate_up.device), min(_CHUNK, next_power_of_2(size))
    num_chunks = ceil_div(size, chunk)
    if num_tokens:
        launch(_silu_and_mul_fp8_kernel, (num_tokens,))(
            gate_up,
            *(scales or (None, None)),
            out.values,
            out.scales,
            scale,
            size,
            CHUNK=chunk,
            NUM_CHUNKS=num_chunks,
            WHOLE_CHUNKS=size // chunk,
            num_warps=max(1, chunk // (32 * _ELEMENTS)),
            # Left to itself, the compiler loads all scales at once, and one program fills a
            # multiprocessor.
            maxnreg=_TWO_PROGRAMS if num_chunks <= _FEW_CHUNKS else None,
            **launch_options(gate_up.device),
        )
    return out
