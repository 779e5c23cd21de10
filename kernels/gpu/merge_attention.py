"""Merges what several programs have found in parts of one context (split-KV attention).

Parts are added in their order in the context, whichever program came last.
"""

# What kernels call is compiled with them, whatever types its decorator has.
# pyright: reportGeneralTypeIssues=false

import triton
import triton.language as tl


@triton.jit
def merge_parts(
    partial_out, partial_lse, out, num_heads, first_head, first_piece, num_parts,
    GROUP: tl.constexpr, PADDED_GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, DIM: tl.constexpr,
    PARTS: tl.constexpr,
):  # fmt: skip
    """Writes the result of a token's group of heads, from `first_head` on.

    Its context's `num_parts` parts are there, of so many pieces from `first_piece` on: normalised
    sums, and the logarithm to base 2 of each one's sum of exponentials. `PARTS` of them are read at
    a time.
    """
    rows = tl.arange(0, PADDED_GROUP)
    heads = first_head + rows
    columns = tl.arange(0, DIM)
    is_head = rows < GROUP
    is_column = columns < HEAD_DIM
    highest = tl.full([PADDED_GROUP], float("-inf"), tl.float32)
    total = tl.zeros([PADDED_GROUP], tl.float32)
    sums = tl.zeros([PADDED_GROUP, DIM], tl.float32)
    for first in range(0, num_parts, PARTS):
        parts = first + tl.arange(0, PARTS)
        is_part = (parts < num_parts)[:, None] & is_head[None, :]
        at = (first_piece + parts)[:, None] * num_heads + heads[None, :]
        lse = tl.load(partial_lse + at, mask=is_part, other=float("-inf"), cache_modifier=".cg")
        found = tl.load(
            partial_out + at[:, :, None] * HEAD_DIM + columns[None, None, :],
            mask=is_part[:, :, None] & is_column[None, None, :],
            other=0.0,
            cache_modifier=".cg",
        )
        # Rows beyond the group have found nothing.
        new_highest = tl.maximum(tl.maximum(highest, tl.max(lse, 0)), -1e30)
        faded = tl.exp2(highest - new_highest)
        weights = tl.exp2(lse - new_highest[None, :])
        total = total * faded + tl.sum(weights, 0)
        sums = sums * faded[:, None] + tl.sum(found * weights[:, :, None], 0)
        highest = new_highest
    result = sums / tl.where(total > 0.0, total, 1.0)[:, None]
    at = heads[:, None] * HEAD_DIM + columns[None, :]
    tl.store(out + at, result, mask=is_head[:, None] & is_column[None, :])
