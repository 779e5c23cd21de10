"""RoPE of q in place, and of k on its way into the paged pool, with v beside it; norms before."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.attention import AttentionBatch
from kernels.fp8 import FP8, FP8_MAX
from kernels.gpu.dependent_launch import (
    launch_options,
    let_successor_start,
    wait_for_predecessor,
)
from kernels.gpu.launching import launch
from kernels.gpu.norm import normalised
from kernels.gpu.sizes import ceil_div, next_power_of_2
from kernels.gpu.turning import turned_rows
from kernels.kv_format import FP8_DTYPES, UNSCALED, KVScales
from kernels.norm import HeadNorms
from kernels.turning import can_turn, turns

_HEADS_PER_PROGRAM = 8
_QUERY_HEADS_PER_PROGRAM, _QUERY_WARPS = 32, 4


@triton.jit
def bounded(values, factor, largest, IS_FP8: tl.constexpr):
    """What an 8-bit pool stores for `values`, as floats: what is too large as the largest."""
    if IS_FP8:
        values = values.to(tl.float32) * factor
        values = tl.clamp(values, -largest, largest, propagate_nan=tl.PropagateNan.ALL)
    return values


@triton.jit
def _rotate(
    source, target, weight, cos, sin, heads, is_head, head_dim, target_stride, half, columns, mask,
    eps, factor, largest, DIM: tl.constexpr, HAS_REST: tl.constexpr, TURNS: tl.constexpr,
    IS_FP8: tl.constexpr,
):  # fmt: skip
    """Writes the rotated first 2 * half elements of each head of `source` to `target`; with the
    `weight` of a norm the rest, too."""
    dtype: tl.constexpr = source.dtype.element_ty
    first_at = heads[:, None] * head_dim + columns[None, :]
    first = tl.load(source + first_at, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(source + first_at + half, mask=mask, other=0.0).to(tl.float32)
    if weight is not None:
        # In place, each part is read only by the threads that write it.
        in_half, whole = columns < half, tl.arange(0, DIM)
        in_rest = (whole >= 2 * half) & (whole < head_dim)
        is_rest = is_head & in_rest[None, :]
        squares = tl.sum(first * first + second * second, 1)
        if HAS_REST:
            rest_at = heads[:, None] * head_dim + whole[None, :]
            rest = tl.load(source + rest_at, mask=is_rest, other=0.0).to(tl.float32)
            squares += tl.sum(rest * rest, 1)
        scale = tl.rsqrt(squares / head_dim + eps)[:, None]
        first = normalised(first, scale, weight, columns, in_half, dtype)
        second = normalised(second, scale, weight + half, columns, in_half, dtype)
        if HAS_REST:
            rest = normalised(rest, scale, weight, whole, in_rest, dtype)
            rest = bounded(rest, factor, largest, IS_FP8)
            tl.store(target + heads[:, None] * target_stride + whole[None, :], rest, mask=is_rest)
    at = heads[:, None] * target_stride + columns[None, :]
    left = first * cos - second * sin
    right = second * cos + first * sin
    if TURNS:
        left, right = turned_rows(left, dtype), turned_rows(right, dtype)
    tl.store(target + at, bounded(left, factor, largest, IS_FP8), mask=mask)
    tl.store(target + at + half, bounded(right, factor, largest, IS_FP8), mask=mask)


@triton.jit
def _copy_heads(
    source, target, heads, head_stride, target_stride, columns, mask,
    factor, largest, IS_FP8: tl.constexpr,
):  # fmt: skip
    values = tl.load(source + heads[:, None] * head_stride + columns[None, :], mask=mask)
    values = bounded(values, factor, largest, IS_FP8)
    tl.store(target + heads[:, None] * target_stride + columns[None, :], values, mask=mask)


@triton.jit
def _rope_and_store_kv_kernel(
    q,
    k,
    v,
    q_weight,
    k_weight,
    pool,
    cos_sin,
    positions,
    slots,
    num_heads,
    num_kv_heads,
    q_stride,
    k_stride,
    v_stride,
    block_stride,
    kv_stride,
    head_dim,
    half,
    block_size,
    eps,
    k_factor,
    v_factor,
    largest,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    DIM: tl.constexpr,
    HAS_REST: tl.constexpr,
    TURNS: tl.constexpr,
    IS_FP8: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_predecessor(PDL)
    let_successor_start(PDL)
    token = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1)
    position = tl.load(positions + token)
    columns = tl.arange(0, HALF)
    in_half = columns < half
    cos = tl.load(cos_sin + position * 2 * half + columns, mask=in_half, other=0.0)[None, :]
    sin = tl.load(cos_sin + position * 2 * half + half + columns, mask=in_half, other=0.0)[None, :]
    num_q_groups = tl.cdiv(num_heads, HEADS)
    if group < num_q_groups:
        heads = group * HEADS + tl.arange(0, HEADS)
        is_head = (heads < num_heads)[:, None]
        mask = is_head & in_half[None, :]
        row = q + token * q_stride
        _rotate(
            row, row, q_weight, cos, sin, heads, is_head, head_dim, head_dim, half, columns, mask,
            eps, 1.0, 0.0, DIM, HAS_REST, TURNS, IS_FP8=False,
        )  # fmt: skip
    else:
        slot = tl.load(slots + token)
        # A padded row of a captured graph has no slot.
        if slot >= 0:
            heads = (group - num_q_groups) * HEADS + tl.arange(0, HEADS)
            is_head = (heads < num_kv_heads)[:, None]
            mask = is_head & in_half[None, :]
            target = pool + (slot // block_size) * block_stride + (slot % block_size) * head_dim
            stride = block_size * head_dim
            row = k + token * k_stride
            _rotate(
                row, target, k_weight, cos, sin, heads, is_head, head_dim, stride, half, columns,
                mask, eps, k_factor, largest, DIM, HAS_REST, TURNS, IS_FP8,
            )  # fmt: skip
            whole = tl.arange(0, DIM)
            if k_weight is None:
                is_rest = is_head & ((whole >= 2 * half) & (whole < head_dim))[None, :]
                _copy_heads(
                    row, target, heads, head_dim, stride, whole, is_rest, k_factor, largest, IS_FP8
                )
            is_value = is_head & (whole < head_dim)[None, :]
            row = v + token * v_stride
            target += kv_stride
            _copy_heads(
                row, target, heads, head_dim, stride, whole, is_value, v_factor, largest, IS_FP8
            )


@triton.jit
def _rotated_fp8_kernel(
    q,
    out,
    cos_sin,
    positions,
    num_heads,
    q_stride,
    head_dim,
    half,
    largest,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    DIM: tl.constexpr,
    HAS_REST: tl.constexpr,
    TURNS: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_predecessor(PDL)
    let_successor_start(PDL)
    token = tl.program_id(0).to(tl.int64)
    position = tl.load(positions + token)
    columns = tl.arange(0, HALF)
    in_half = columns < half
    cos = tl.load(cos_sin + position * 2 * half + columns, mask=in_half, other=0.0)[None, :]
    sin = tl.load(cos_sin + position * 2 * half + half + columns, mask=in_half, other=0.0)[None, :]
    heads = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    is_head = (heads < num_heads)[:, None]
    source, target = q + token * q_stride, out + token * num_heads * head_dim
    _rotate(
        source, target, None, cos, sin, heads, is_head, head_dim, head_dim, half, columns,
        is_head & in_half[None, :], 0.0, 1.0, largest, DIM, HAS_REST, TURNS, IS_FP8=True,
    )  # fmt: skip
    if HAS_REST:
        whole = tl.arange(0, DIM)
        is_rest = is_head & ((whole >= 2 * half) & (whole < head_dim))[None, :]
        _copy_heads(
            source, target, heads, head_dim, head_dim, whole, is_rest, 1.0, largest, IS_FP8=True
        )


def rotated_fp8(q: Tensor, cos_sin: Tensor, positions: Tensor) -> Tensor:
    """Queries [num_tokens, num_heads, head_dim] rotated, and turned, as by `rope_and_store_kv` for
    an 8-bit pool, in 8 bits (e4m3), what is beyond their range as its ends; heads of a token lie
    side by side."""
    num_tokens, num_heads, head_dim = q.shape
    out = torch.empty(q.shape, dtype=FP8, device=q.device)
    half = cos_sin.shape[1] // 2
    launch(_rotated_fp8_kernel, (num_tokens, ceil_div(num_heads, _QUERY_HEADS_PER_PROGRAM)))(
        q,
        out,
        cos_sin,
        positions,
        num_heads,
        q.stride(0),
        head_dim,
        half,
        FP8_MAX,
        HEADS=_QUERY_HEADS_PER_PROGRAM,
        HALF=next_power_of_2(half),
        DIM=next_power_of_2(head_dim),
        HAS_REST=2 * half < head_dim,
        TURNS=2 * half == head_dim and can_turn(head_dim),
        num_warps=_QUERY_WARPS,
        **launch_options(q.device),
    )
    return out


def rope_and_store_kv(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos_sin: Tensor,
    batch: AttentionBatch,
    kv_pool: Tensor,
    layer: int,
    *,
    kv_scales: KVScales = UNSCALED,
    norms: HeadNorms | None = None,
) -> None:
    """`kernels.rope.rope_and_store_kv`; heads of a token lie side by side. Slots below 0 store
    nothing."""
    num_tokens, num_heads, head_dim = q.shape
    num_kv_heads, block_size = kv_pool.shape[3:5]
    half = cos_sin.shape[1] // 2
    num_groups = ceil_div(num_heads, _HEADS_PER_PROGRAM)
    num_groups += ceil_div(num_kv_heads, _HEADS_PER_PROGRAM)
    if not num_tokens:
        return
    launch(_rope_and_store_kv_kernel, (num_tokens, num_groups))(
        q,
        k,
        v,
        norms and norms.q,
        norms and norms.k,
        kv_pool.select(1, layer),
        cos_sin,
        batch.positions,
        batch.slots,
        num_heads,
        num_kv_heads,
        q.stride(0),
        k.stride(0),
        v.stride(0),
        kv_pool.stride(0),
        kv_pool.stride(2),
        head_dim,
        half,
        block_size,
        norms and norms.eps,
        1.0 / kv_scales.k,
        1.0 / kv_scales.v,
        torch.finfo(kv_pool.dtype).max,
        HEADS=_HEADS_PER_PROGRAM,
        HALF=next_power_of_2(half),
        DIM=next_power_of_2(head_dim),
        HAS_REST=2 * half < head_dim,
        TURNS=turns(kv_pool, 2 * half),
        IS_FP8=kv_pool.dtype in FP8_DTYPES,
        num_warps=4,
        **launch_options(q.device),
    )
