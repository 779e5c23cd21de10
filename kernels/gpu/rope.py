"""RoPE of q in place, and of k on its way into the paged pool, with v beside it; norms before."""

# What kernels call is compiled with them, whatever types its decorator has.
# pyright: reportGeneralTypeIssues=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.attention import AttentionBatch
from kernels.fp8 import FP8
from kernels.gpu.dependent_launch import (
    launch_options,
    let_successor_start,
    wait_for_predecessor,
)
from kernels.gpu.launching import launch
from kernels.gpu.norm import normalised
from kernels.gpu.saturating import bound_of, bounded
from kernels.gpu.sizes import ceil_div, next_power_of_2
from kernels.gpu.turning import load_matrix, matrix_of, turned_rows
from kernels.kv_format import FP8_DTYPES, UNSCALED, KVScales
from kernels.norm import HeadNorms
from kernels.turning import can_turn, turns

_HEADS_PER_PROGRAM = 8
_QUERY_HEADS, _QUERY_WARPS = 32, 4
# Heads are turned faster together than each token's on their own; few tokens leave a card idle.
_TURNED_TOKENS, _MANY_TOKENS = 8, 2048


@triton.jit
def rotated_halves(first, second, cos, sin):
    """Halves of heads, [num_rows, half], rotated; angles are of each row, or [1, half]. Kernels are
    to agree to the bit: left alone, a compiler rounds one product or the other as it likes."""
    return tl.fma(first, cos, -(second * sin)), tl.fma(second, cos, first * sin)


@triton.jit
def _rotate(
    source, target, weight, angles, matrix, is_row, head_dim, half, eps, factor, largest,
    HALF: tl.constexpr, DIM: tl.constexpr, HAS_REST: tl.constexpr, TURNS: tl.constexpr,
    IS_FP8: tl.constexpr, has_angles,
):  # fmt: skip
    """Writes the rotated first 2 * half elements of heads, whose addresses are [num_rows, 1], from
    `source` to `target`; with the `weight` of a norm the rest, too. `angles` are the addresses of
    rows' cosines and sines, or of one for all, and read where `has_angles`."""
    dtype: tl.constexpr = source.dtype.element_ty
    columns = tl.arange(0, HALF)
    in_half = columns < half
    mask = is_row & in_half[None, :]
    first = tl.load(source + columns[None, :], mask=mask, other=0.0).to(tl.float32)
    second = tl.load(source + half + columns[None, :], mask=mask, other=0.0).to(tl.float32)
    # Behind these, since their addresses are waited for.
    is_angle = has_angles & in_half[None, :]
    cos = tl.load(angles + columns[None, :], mask=is_angle, other=0.0)
    sin = tl.load(angles + half + columns[None, :], mask=is_angle, other=0.0)
    if weight is not None:
        # In place, each part is read only by the threads that write it.
        whole = tl.arange(0, DIM)
        in_rest = (whole >= 2 * half) & (whole < head_dim)
        is_rest = is_row & in_rest[None, :]
        squares = tl.sum(first * first + second * second, 1)
        if HAS_REST:
            rest = tl.load(source + whole[None, :], mask=is_rest, other=0.0).to(tl.float32)
            squares += tl.sum(rest * rest, 1)
        scale = tl.rsqrt(squares / head_dim + eps)[:, None]
        first = normalised(first, scale, weight, columns, in_half, dtype)
        second = normalised(second, scale, weight + half, columns, in_half, dtype)
        if HAS_REST:
            rest = normalised(rest, scale, weight, whole, in_rest, dtype)
            rest = bounded(rest, factor, largest, IS_FP8)
            tl.store(target + whole[None, :], rest, mask=is_rest)
    left, right = rotated_halves(first, second, cos, sin)
    if TURNS:
        left, right = turned_rows(left, matrix, dtype), turned_rows(right, matrix, dtype)
    left = bounded(left, factor, largest, IS_FP8)
    right = bounded(right, factor, largest, IS_FP8)
    tl.store(target + columns[None, :], left, mask=mask)
    tl.store(target + half + columns[None, :], right, mask=mask)


@triton.jit
def _copy_heads(
    source, target, columns, mask, factor, largest, IS_FP8: tl.constexpr
):  # fmt: skip
    """Elements of heads, whose addresses are [num_rows, 1]."""
    values = tl.load(source + columns[None, :], mask=mask)
    values = bounded(values, factor, largest, IS_FP8)
    tl.store(target + columns[None, :], values, mask=mask)


@triton.jit(do_not_specialize=["num_tokens"])
def _rope_and_store_kv_kernel(
    q,
    k,
    v,
    q_weight,
    k_weight,
    pool,
    cos_sin,
    matrix,
    positions,
    slots,
    num_tokens,
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
    TOKENS: tl.constexpr,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    DIM: tl.constexpr,
    HAS_REST: tl.constexpr,
    TURNS: tl.constexpr,
    IS_FP8: tl.constexpr,
    PDL: tl.constexpr,
):
    if TURNS:
        matrix = load_matrix(matrix, HALF)
    wait_for_predecessor(PDL)
    let_successor_start(PDL)
    # A row is a head of a token.
    rows = tl.arange(0, TOKENS * HEADS)
    token = tl.program_id(0).to(tl.int64) * TOKENS
    if TOKENS > 1:
        token += (rows // HEADS)[:, None]
    is_token = token < num_tokens
    angles = cos_sin + tl.load(positions + token, mask=is_token, other=0) * 2 * half
    group = tl.program_id(1)
    num_q_groups = tl.cdiv(num_heads, HEADS)
    if group < num_q_groups:
        head = (group * HEADS + rows % HEADS)[:, None]
        source = q + token * q_stride + head * head_dim
        _rotate(
            source, source, q_weight, angles, matrix, is_token & (head < num_heads), head_dim,
            half, eps, 1.0, 0.0, HALF, DIM, HAS_REST, TURNS, IS_FP8=False, has_angles=is_token,
        )  # fmt: skip
    else:
        head = ((group - num_q_groups) * HEADS + rows % HEADS)[:, None]
        # A padded row of a captured graph has no slot.
        slot = tl.load(slots + token, mask=is_token, other=-1)
        is_stored = (slot >= 0) & (head < num_kv_heads)
        target = pool + (slot // block_size) * block_stride + (slot % block_size) * head_dim
        target += head * block_size * head_dim
        source = k + token * k_stride + head * head_dim
        _rotate(
            source, target, k_weight, angles, matrix, is_stored, head_dim, half, eps, k_factor,
            largest, HALF, DIM, HAS_REST, TURNS, IS_FP8, has_angles=is_token,
        )  # fmt: skip
        whole = tl.arange(0, DIM)
        if HAS_REST and k_weight is None:
            is_rest = is_stored & ((whole >= 2 * half) & (whole < head_dim))[None, :]
            _copy_heads(source, target, whole, is_rest, k_factor, largest, IS_FP8)
        is_value = is_stored & (whole < head_dim)[None, :]
        source = v + token * v_stride + head * head_dim
        _copy_heads(source, target + kv_stride, whole, is_value, v_factor, largest, IS_FP8)


@triton.jit
def _rotated_fp8_kernel(
    q,
    out,
    cos_sin,
    matrix,
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
    if TURNS:
        matrix = load_matrix(matrix, HALF)
    token = tl.program_id(0).to(tl.int64)
    angles = cos_sin + tl.load(positions + token) * 2 * half
    wait_for_predecessor(PDL)
    let_successor_start(PDL)
    head = (tl.program_id(1) * HEADS + tl.arange(0, HEADS))[:, None]
    is_head = head < num_heads
    source = q + token * q_stride + head * head_dim
    target = out + (token * num_heads + head) * head_dim
    _rotate(
        source, target, None, angles, matrix, is_head, head_dim, half, 0.0, 1.0, largest, HALF,
        DIM, HAS_REST, TURNS, IS_FP8=True, has_angles=True,
    )  # fmt: skip
    if HAS_REST:
        whole = tl.arange(0, DIM)
        is_rest = is_head & ((whole >= 2 * half) & (whole < head_dim))[None, :]
        _copy_heads(source, target, whole, is_rest, 1.0, largest, IS_FP8=True)


def rotated_fp8(q: Tensor, cos_sin: Tensor, positions: Tensor) -> Tensor:
    """Queries [num_tokens, num_heads, head_dim] rotated, and turned, as by `rope_and_store_kv` for
    an 8-bit pool, in 8 bits (e4m3), what is beyond their range as its ends; heads of a token lie
    side by side."""
    num_tokens, num_heads, head_dim = q.shape
    out = torch.empty(q.shape, dtype=FP8, device=q.device)
    half = cos_sin.shape[1] // 2
    is_turned = can_turn(head_dim, 2 * half)
    launch(_rotated_fp8_kernel, (num_tokens, ceil_div(num_heads, _QUERY_HEADS)))(
        q,
        out,
        cos_sin,
        matrix_of(head_dim, q.device) if is_turned else None,
        positions,
        num_heads,
        q.stride(0),
        head_dim,
        half,
        bound_of(FP8, q.device),
        HEADS=_QUERY_HEADS,
        HALF=next_power_of_2(half),
        DIM=next_power_of_2(head_dim),
        HAS_REST=2 * half < head_dim,
        TURNS=is_turned,
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
    is_turned = turns(kv_pool, 2 * half)
    tokens = _TURNED_TOKENS if is_turned and num_tokens >= _MANY_TOKENS else 1
    launch(_rope_and_store_kv_kernel, (ceil_div(num_tokens, tokens), num_groups))(
        q,
        k,
        v,
        norms and norms.q,
        norms and norms.k,
        kv_pool.select(1, layer),
        cos_sin,
        matrix_of(head_dim, q.device) if is_turned else None,
        batch.positions,
        batch.slots,
        num_tokens,
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
        bound_of(kv_pool.dtype, kv_pool.device),
        TOKENS=tokens,
        HEADS=_HEADS_PER_PROGRAM,
        HALF=next_power_of_2(half),
        DIM=next_power_of_2(head_dim),
        HAS_REST=2 * half < head_dim,
        TURNS=is_turned,
        IS_FP8=kv_pool.dtype in FP8_DTYPES,
        num_warps=4 if tokens == 1 else 8,
        **launch_options(q.device),
    )
