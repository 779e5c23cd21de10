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
from kernels.gpu.rope import rotated_halves
from kernels.gpu.saturating import bounded
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
def load_halves(source, weight, eps, mask, HALF: tl.constexpr):
    """Both halves of heads at `source` [num_rows, 1], in float32; normalised if there is a norm's
    `weight`. Where `mask` [num_rows, 1] isn't, 0."""
    columns = tl.arange(0, HALF)
    first = tl.load(source + columns[None, :], mask=mask, other=0.0).to(tl.float32)
    second = tl.load(source + HALF + columns[None, :], mask=mask, other=0.0).to(tl.float32)
    if weight is not None:
        dtype: tl.constexpr = source.dtype.element_ty
        squares = tl.sum(first * first + second * second, 1)
        scale = tl.rsqrt(squares / (2 * HALF) + eps)[:, None]
        first = normalised(first, scale, weight, columns, None, dtype)
        second = normalised(second, scale, weight + HALF, columns, None, dtype)
    return first, second


@triton.jit
def rotated_heads(
    first, second, cos, sin, matrix, dtype: tl.constexpr, IS_FP8: tl.constexpr, TURNS: tl.constexpr
):
    """Halves of heads, [num_rows, half], rotated, turned for keys that are, and joined: in `dtype`,
    or float32 for keys of 8 bits, which aren't rounded twice."""
    left, right = rotated_halves(first, second, cos, sin)
    if not IS_FP8:
        left, right = left.to(dtype), right.to(dtype)
    heads = tl.permute(tl.join(left, right), (0, 2, 1))
    if TURNS:
        # Both halves by one product.
        halves = tl.reshape(heads, (2 * left.shape[0], left.shape[1]))
        heads = turned_rows(halves, matrix, dtype)
    return tl.reshape(heads, (left.shape[0], 2 * left.shape[1]))


@triton.jit
def store_new_token(
    keys, is_key, value, target, kv_stride, k_factor, v_factor, largest, IS_FP8: tl.constexpr
):
    """Writes one head's key, which is the row where `is_key` [num_rows, 1] is, and value to
    `target`, for this program's threads to read."""
    columns = tl.arange(0, keys.shape[1])
    # The same address in each row: one of them is written.
    at = tl.zeros_like(is_key).to(tl.int32) + columns[None, :]
    tl.store(target + at, bounded(keys, k_factor, largest, IS_FP8), mask=is_key)
    tl.store(target + kv_stride + columns, bounded(value, v_factor, largest, IS_FP8))
    tl.debug_barrier()
