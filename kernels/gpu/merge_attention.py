"""Merges what several programs have found in parts of one context (split-KV attention).

Parts are added in their order in the context, whichever program came last.
"""

import triton
import triton.language as tl
from torch import Tensor

from kernels.gpu.dependent_launch import (
    launch_options,
    let_successor_start,
    wait_for_predecessor,
)
from kernels.gpu.launching import launch
from kernels.gpu.sizes import next_power_of_2

# Of parts being added, so that the loads of several are on their way together.
_ELEMENTS_PER_THREAD = 128


@triton.jit
def merge_group(
    partial_out,
    partial_lse,
    out,
    first_head,
    num_parts,
    GROUP: tl.constexpr,
    PADDED_GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Writes the result of a group of heads, from `first_head` on, counted over all sequences.

    The group's first `num_parts` parts are there, at least one. `PARTS` of them are read at a time;
    with `NUM_SPLITS` it is a power of two.
    """
    rows = tl.arange(0, PADDED_GROUP)
    columns = tl.arange(0, DIM)
    heads = first_head + rows
    is_head = rows < GROUP
    mask = is_head[:, None] & (columns < HEAD_DIM)[None, :]
    splits = tl.arange(0, NUM_SPLITS)
    lse = tl.load(
        partial_lse + heads[None, :] * NUM_SPLITS + splits[:, None],
        mask=(splits < num_parts)[:, None] & is_head[None, :],
        other=float("-inf"),
        cache_modifier=".cg",
    )
    highest = tl.max(lse, 0)
    highest = tl.where(highest > float("-inf"), highest, 0.0)
    total = tl.sum(tl.exp2(lse - highest[None, :]), 0)
    sums = tl.zeros([PADDED_GROUP, DIM], tl.float32)
    for first in tl.static_range(0, NUM_SPLITS, PARTS):
        splits = first + tl.arange(0, PARTS)
        is_part = (splits < num_parts)[:, None] & is_head[None, :]
        at = heads[None, :] * NUM_SPLITS + splits[:, None]
        lse = tl.load(partial_lse + at, mask=is_part, other=float("-inf"), cache_modifier=".cg")
        weights = tl.exp2(lse - highest[None, :])
        parts = tl.load(
            partial_out + at[:, :, None] * HEAD_DIM + columns[None, None, :],
            mask=is_part[:, :, None] & (columns < HEAD_DIM)[None, None, :],
            other=0.0,
            cache_modifier=".cg",
        )
        sums += tl.sum(parts * weights[:, :, None], 0)
    result = sums / tl.where(total > 0.0, total, 1.0)[:, None]
    tl.store(out + heads[:, None] * HEAD_DIM + columns[None, :], result, mask=mask)


@triton.jit
def _merge_kernel(
    partial_out,
    partial_lse,
    out,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    SPLITS: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_predecessor(PDL)
    let_successor_start(PDL)
    row = tl.program_id(0).to(tl.int64)
    splits = tl.arange(0, SPLITS)
    columns = tl.arange(0, DIM)
    is_split = splits < NUM_SPLITS
    lse = tl.load(partial_lse + row * NUM_SPLITS + splits, mask=is_split, other=float("-inf"))
    highest = tl.max(lse, 0)
    highest = tl.where(highest > float("-inf"), highest, 0.0)
    weights = tl.exp2(lse - highest)
    total = tl.sum(weights, 0)
    at = (row * NUM_SPLITS + splits[:, None]) * HEAD_DIM + columns[None, :]
    mask = is_split[:, None] & (columns < HEAD_DIM)[None, :]
    parts = tl.load(partial_out + at, mask=mask, other=0.0)
    result = tl.sum(parts * weights[:, None], 0) / tl.where(total > 0.0, total, 1.0)
    tl.store(out + row * HEAD_DIM + columns, result, mask=columns < HEAD_DIM)


def parts_at_once(part_size: int, num_warps: int) -> int:
    """How many parts of `part_size` elements, both powers of two, `merge_group` best takes."""
    return max(1, _ELEMENTS_PER_THREAD * 32 * num_warps // part_size)


def merge_attention(partial_out: Tensor, partial_lse: Tensor, out: Tensor) -> None:
    """Of each part an output, normalised, and the logarithm of its sum of exponentials.

    `partial_out` is float32 [num_seqs, num_heads, num_splits, head_dim]; `partial_lse` the same
    without the last dimension, to base 2, -inf for a part without tokens; `out` [num_seqs,
    num_heads, head_dim].
    """
    num_seqs, num_heads, num_splits, head_dim = partial_out.shape
    launch(_merge_kernel, (num_seqs * num_heads,))(
        partial_out,
        partial_lse,
        out,
        HEAD_DIM=head_dim,
        DIM=next_power_of_2(head_dim),
        NUM_SPLITS=num_splits,
        SPLITS=next_power_of_2(num_splits),
        num_warps=4,
        **launch_options(out.device),
    )
