"""RoPE of a decode step's query, key and value inside of attention's kernel.

Who rotates a token's query needs no other program's, and its key and value are read by one program
alone, of each KV head: that with the end of the context, which stores them first.
"""

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from kernels.gpu.rope import bounded
from kernels.kv_format import KVScales


@dataclass(frozen=True, slots=True, eq=False)
class NewTokens:
    """What `kernels.rope.rope_and_store_kv` takes beside queries, of one token a sequence."""

    k: Tensor
    v: Tensor
    cos_sin: Tensor
    kv_scales: KVScales


def rotates_whole_heads(head_dim: int, rotary_dim: int) -> bool:
    """Whether this is for heads of that size."""
    return rotary_dim == head_dim and head_dim & (head_dim - 1) == 0


@triton.jit
def rotated_query(query, heads, is_head, cos, sin, HALF: tl.constexpr):
    """[heads, 2 * HALF] of a token, rotated."""
    columns = tl.arange(0, HALF)
    cos, sin = cos[None, :], sin[None, :]
    at = heads[:, None] * (2 * HALF) + columns[None, :]
    first = tl.load(query + at, mask=is_head[:, None], other=0.0).to(tl.float32)
    second = tl.load(query + at + HALF, mask=is_head[:, None], other=0.0).to(tl.float32)
    left = (first * cos - second * sin).to(query.dtype.element_ty)
    right = (second * cos + first * sin).to(query.dtype.element_ty)
    halves = tl.permute(tl.join(left, right), (0, 2, 1))
    return tl.reshape(halves, (heads.shape[0], 2 * HALF))


@triton.jit
def store_new_token(
    key, value, target, kv_stride, cos, sin, k_factor, v_factor, largest,
    HALF: tl.constexpr, IS_FP8: tl.constexpr,
):  # fmt: skip
    """Writes one head's key, rotated, and value to `target`, for this program's threads to read."""
    columns = tl.arange(0, HALF)
    first = tl.load(key + columns).to(tl.float32)
    second = tl.load(key + HALF + columns).to(tl.float32)
    left = bounded(first * cos - second * sin, k_factor, largest, IS_FP8)
    right = bounded(second * cos + first * sin, k_factor, largest, IS_FP8)
    whole = tl.arange(0, 2 * HALF)
    copied = bounded(tl.load(value + whole), v_factor, largest, IS_FP8)
    tl.store(target + columns, left)
    tl.store(target + HALF + columns, right)
    tl.store(target + kv_stride + whole, copied)
    tl.debug_barrier()
