"""Merges what several programs have found in parts of one context (split-KV attention)."""

# A launch takes compile options beside the kernel's arguments.
# pyright: reportCallIssue=false

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


def merge_attention(partial_out: Tensor, partial_lse: Tensor, out: Tensor) -> None:
    """Of each part an output, normalised, and the logarithm of its sum of exponentials.

    `partial_out` is float32 [num_seqs, num_heads, num_splits, head_dim]; `partial_lse` the same
    without the last dimension, to base 2, -inf for a part without tokens; `out` [num_seqs,
    num_heads, head_dim].
    """
    num_seqs, num_heads, num_splits, head_dim = partial_out.shape
    _merge_kernel[(num_seqs * num_heads,)](
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
