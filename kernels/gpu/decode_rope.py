"""RoPE of a decode step's query, key and value inside of attention's kernel, and norms before it.

Who rotates a token's query needs no other program's, and its key and value are read by one program
alone, of each KV head: that with the end of the context, which stores them first.
"""

# What kernels call is compiled with them, whatever types its decorator has.
# pyright: reportGeneralTypeIssues=false

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from kernels.gpu.norm import normalised
from kernels.gpu.rope import bounded
from kernels.gpu.turning import turned_rows
from kernels.kv_format import KVScales
from kernels.norm import HeadNorms


@dataclass(frozen=True, slots=True, eq=False)
class NewTokens:
    """What `kernels.rope.rope_and_store_kv` takes beside queries, of one token a sequence."""

    k: Tensor
    v: Tensor
    cos_sin: Tensor
    kv_scales: KVScales
    norms: HeadNorms | None = None


def rotates_whole_heads(head_dim: int, rotary_dim: int) -> bool:
    """Whether this is for heads of that size."""
    return rotary_dim == head_dim and head_dim & (head_dim - 1) == 0


@triton.jit
def _normalised_halves(first, second, weight, columns, eps, dtype: tl.constexpr):
    """Of one head, or of several in rows."""
    half: tl.constexpr = columns.shape[0]
    squares = tl.sum(first * first + second * second, -1, keep_dims=True)
    scale = tl.rsqrt(squares / (2 * half) + eps)
    first = normalised(first, scale, weight, columns, None, dtype)
    return first, normalised(second, scale, weight + half, columns, None, dtype)


@triton.jit
def _turned_half(half, dtype: tl.constexpr):
    # Products have no fewer columns than that: all are this one.
    rows = tl.broadcast_to(half[None, :], (8, half.shape[0]))
    return tl.max(turned_rows(rows, dtype), 0)


@triton.jit
def rotated_query(
    query, weight, eps, heads, is_head, cos, sin, HALF: tl.constexpr, TURNS: tl.constexpr
):  # fmt: skip
    """[heads, 2 * HALF] of a token, rotated; normalised before if there is a norm's `weight`, and
    turned afterwards for keys that are."""
    dtype: tl.constexpr = query.dtype.element_ty
    columns = tl.arange(0, HALF)
    cos, sin = cos[None, :], sin[None, :]
    at = heads[:, None] * (2 * HALF) + columns[None, :]
    first = tl.load(query + at, mask=is_head[:, None], other=0.0).to(tl.float32)
    second = tl.load(query + at + HALF, mask=is_head[:, None], other=0.0).to(tl.float32)
    if weight is not None:
        first, second = _normalised_halves(first, second, weight, columns, eps, dtype)
    left = first * cos - second * sin
    right = second * cos + first * sin
    if TURNS:
        left, right = turned_rows(left, dtype), turned_rows(right, dtype)
    halves = tl.permute(tl.join(left.to(dtype), right.to(dtype)), (0, 2, 1))
    return tl.reshape(halves, (heads.shape[0], 2 * HALF))


@triton.jit
def store_new_token(
    key, value, weight, eps, target, kv_stride, cos, sin, k_factor, v_factor, largest,
    HALF: tl.constexpr, TURNS: tl.constexpr, IS_FP8: tl.constexpr,
):  # fmt: skip
    """Writes one head's key, rotated and turned as `rotated_query` does, and value to `target`, for
    this program's threads to read."""
    dtype: tl.constexpr = key.dtype.element_ty
    columns = tl.arange(0, HALF)
    first = tl.load(key + columns).to(tl.float32)
    second = tl.load(key + HALF + columns).to(tl.float32)
    if weight is not None:
        first, second = _normalised_halves(first, second, weight, columns, eps, dtype)
    left = first * cos - second * sin
    right = second * cos + first * sin
    if TURNS:
        left, right = _turned_half(left, dtype), _turned_half(right, dtype)
    left = bounded(left, k_factor, largest, IS_FP8)
    right = bounded(right, k_factor, largest, IS_FP8)
    whole = tl.arange(0, 2 * HALF)
    copied = bounded(tl.load(value + whole), v_factor, largest, IS_FP8)
    tl.store(target + columns, left)
    tl.store(target + HALF + columns, right)
    tl.store(target + kv_stride + whole, copied)
    tl.debug_barrier()
