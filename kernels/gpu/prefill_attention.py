"""Paged causal attention of several queries a sequence, decode rows among them.

A program takes a tile of rows: some consecutive queries of one sequence, each with all the query
heads that share a KV head, so that keys and values are read once for the group. It walks the
context in tiles of tokens, first those that every row sees, without a mask, then the rest.

A few queries are too few tiles for a card. Those of a long context are then walked in parts, by a
program each, of whom the last merges what all have found. A step's tokens decide that, so only
pools of 8 bits have it: where keys are as wide as queries, nobody's result depends on who else is
in a step.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.attention import AttentionBatch
from kernels.gpu.arrivals import arrival_counters
from kernels.gpu.dependent_launch import (
    launch_options,
    let_successor_start,
    wait_for_predecessor,
)
from kernels.gpu.launching import launch
from kernels.gpu.prefill_tiles import MAX_SEQS_IN_PARTS, PrefillTile, prefill_tiles
from kernels.gpu.sizes import next_power_of_2

_MIN_ROWS = 16
_MAX_SEQS = tl.constexpr(MAX_SEQS_IN_PARTS)
# The hardware's exponential is to base 2.
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _sequence_of(query_starts, tile, num_seqs, QUERIES: tl.constexpr):
    """The sequence that a tile of queries belongs to.

    Sequence i owns the tiles from `query_starts[i] // QUERIES + i` on: at least as many as it has
    queries for, at most one more, so a tile is found by bisection and needs no list.
    """
    low = 0
    high = num_seqs
    while low < high:
        middle = (low + high) // 2
        first_tile = tl.load(query_starts + middle) // QUERIES + middle
        if first_tile <= tile:
            low = middle + 1
        else:
            high = middle
    return low - 1


@triton.jit
def _attend_tiles(
    query,
    head_pool,
    table,
    highest,
    total,
    sums,
    start,
    end,
    kv_len,
    positions,
    columns,
    block_stride,
    kv_stride,
    window,
    scale,
    softcap,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TOKENS: tl.constexpr,
    IS_MASKED: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
):
    in_head = (columns < HEAD_DIM)[None, :]
    for first in range(start, end, TOKENS):
        tokens = first + tl.arange(0, TOKENS)
        if IS_MASKED:
            exists = tokens < kv_len
            block = tl.load(table + tokens // BLOCK_SIZE, mask=exists, other=0).to(tl.int64)
            present = exists[:, None] & in_head
        else:
            block = tl.load(table + tokens // BLOCK_SIZE).to(tl.int64)
            present = in_head
        at = block * block_stride + (tokens % BLOCK_SIZE) * HEAD_DIM
        in_pool = head_pool + at[:, None] + columns[None, :]
        key = tl.load(in_pool, mask=present, other=0.0).to(query.dtype)
        scores = tl.dot(query, tl.trans(key), input_precision="ieee")
        if HAS_SOFTCAP:
            capped = 2.0 * tl.sigmoid(2.0 * scores * (scale / softcap)) - 1.0
            scores = softcap * capped * LOG2_E
        else:
            scores = scores * (scale * LOG2_E)
        if IS_MASKED:
            distance = positions[:, None] - tokens[None, :]
            visible = distance >= 0
            if HAS_WINDOW:
                visible = visible & (distance < window)
            scores = tl.where(visible, scores, float("-inf"))
        new_highest = tl.maximum(highest, tl.max(scores, 1))
        # A row that has seen nothing yet has no maximum to subtract.
        subtracted = new_highest
        if IS_MASKED:
            subtracted = tl.where(new_highest > float("-inf"), new_highest, 0.0)
        weights = tl.exp2(scores - subtracted[:, None])
        faded = tl.exp2(highest - subtracted)
        total = total * faded + tl.sum(weights, 1)
        value = tl.load(in_pool + kv_stride, mask=present, other=0.0).to(query.dtype)
        sums = sums * faded[:, None]
        sums = tl.dot(weights.to(value.dtype), value, sums, input_precision="ieee")
        highest = new_highest
    return highest, total, sums


@triton.jit(do_not_specialize=["num_seqs", "num_tokens", "table_stride"])
def _prefill_kernel(
    q,
    pool,
    out,
    partial_out,
    partial_lse,
    arrivals,
    query_starts,
    kv_lens,
    block_tables,
    num_seqs,
    num_tokens,
    table_stride,
    q_stride,
    block_stride,
    kv_stride,
    window,
    scale,
    v_scale,
    softcap,
    num_heads,
    GROUP: tl.constexpr,
    QUERIES: tl.constexpr,
    ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TOKENS: tl.constexpr,
    PART_TOKENS: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_predecessor(PDL)
    let_successor_start(PDL)
    part = tl.program_id(2)
    if PART_TOKENS:
        # Most steps have no long context, and then there is one part.
        seqs = tl.arange(0, _MAX_SEQS)
        longest = tl.max(tl.load(kv_lens + seqs, mask=seqs < num_seqs, other=0))
        if part * PART_TOKENS >= longest:
            return
    # Late tiles see the longest contexts: they start first, short ones fill the gaps at the end.
    # Tiles of one head run side by side, so that its keys and values are read once into the L2.
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    kv_head = tl.program_id(1)
    seq = _sequence_of(query_starts, tile, num_seqs, QUERIES)
    seq_start = tl.load(query_starts + seq)
    num_queries = tl.load(query_starts + seq + 1) - seq_start
    first_query = (tile - (seq_start // QUERIES + seq)) * QUERIES
    if first_query >= num_queries:
        return
    kv_len = tl.load(kv_lens + seq)
    context_len = kv_len - num_queries

    rows = tl.arange(0, ROWS)
    columns = tl.arange(0, DIM)
    queries = first_query + rows // GROUP
    heads = kv_head * GROUP + rows % GROUP
    is_row = (rows < QUERIES * GROUP) & (queries < num_queries)
    mask = is_row[:, None] & (columns < HEAD_DIM)[None, :]
    tokens = (seq_start + queries).to(tl.int64)
    query = tl.load(
        q + tokens[:, None] * q_stride + heads[:, None] * HEAD_DIM + columns[None, :],
        mask=mask,
        other=0.0,
    )
    positions = context_len + queries
    table = block_tables + seq.to(tl.int64) * table_stride
    head_pool = pool + kv_head * BLOCK_SIZE * HEAD_DIM

    highest = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    sums = tl.zeros([ROWS, DIM], tl.float32)
    first_position = context_len + first_query
    end = tl.minimum(first_position + QUERIES, kv_len)
    start = 0
    num_parts = 1
    if PART_TOKENS:
        share = tl.cdiv(tl.cdiv(end, tl.num_programs(2)), TOKENS) * TOKENS
        share = tl.maximum(share, PART_TOKENS)
        num_parts = tl.cdiv(end, share)
        start = part * share
        # The first one writes what a padded row without a context gets, zeros.
        if (start >= end) & (part > 0):
            return
        end = tl.minimum(start + share, end)
    if HAS_WINDOW:
        masked_start = tl.maximum(first_position - window + 1, 0) // TOKENS * TOKENS
    else:
        masked_start = (first_position + 1) // TOKENS * TOKENS
        highest, total, sums = _attend_tiles(
            query, head_pool, table, highest, total, sums, start, tl.minimum(masked_start, end),
            kv_len, positions, columns, block_stride, kv_stride, window, scale, softcap,
            HEAD_DIM, BLOCK_SIZE, TOKENS,
            IS_MASKED=False, HAS_WINDOW=HAS_WINDOW, HAS_SOFTCAP=HAS_SOFTCAP,
        )  # fmt: skip
    masked_start = tl.maximum(masked_start, start)
    highest, total, sums = _attend_tiles(
        query, head_pool, table, highest, total, sums, masked_start, end, kv_len, positions,
        columns, block_stride, kv_stride, window, scale, softcap, HEAD_DIM, BLOCK_SIZE, TOKENS,
        IS_MASKED=True, HAS_WINDOW=HAS_WINDOW, HAS_SOFTCAP=HAS_SOFTCAP,
    )  # fmt: skip
    total_or_one = tl.where(total > 0.0, total, 1.0)
    result = sums * (v_scale / total_or_one)[:, None]
    of_heads = tokens * num_heads + heads
    at = of_heads[:, None] * HEAD_DIM + columns[None, :]
    # One is for the compiler, the other for each tile.
    if PART_TOKENS:  # noqa: SIM102
        if num_parts > 1:
            head_rows = num_tokens.to(tl.int64) * num_heads
            tl.store(partial_out + part * head_rows * HEAD_DIM + at, result, mask=mask)
            lse = tl.where(total > 0.0, highest + tl.log2(total_or_one), float("-inf"))
            tl.store(partial_lse + part * head_rows + of_heads, lse, mask=is_row)
            # Every thread's part is written before the one that counts says so.
            tl.debug_barrier()
            counter = arrivals + tile * tl.num_programs(1) + kv_head
            if tl.atomic_add(counter, 1, sem="acq_rel") < num_parts - 1:
                return
            tl.debug_barrier()
            result = _merged(
                partial_out + at, partial_lse + of_heads, mask, is_row, head_rows, num_parts,
                HEAD_DIM, ROWS, DIM,
            )  # fmt: skip
            tl.store(counter, 0)
    tl.store(out + at, result, mask=mask)


@triton.jit
def _merged(
    partial_out, partial_lse, mask, is_row, head_rows, num_parts,
    HEAD_DIM: tl.constexpr, ROWS: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    """A tile's result from those of its parts, in their order, whoever came last: each at
    `partial_out`, normalised, and the logarithm to base 2 of its sum of exponentials."""
    # Finite: rows that see nothing of their first parts have no weight there.
    highest = tl.full([ROWS], -1e30, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    sums = tl.zeros([ROWS, DIM], tl.float32)
    for _ in range(num_parts):
        lse = tl.load(partial_lse, mask=is_row, other=float("-inf"), cache_modifier=".cg")
        found = tl.load(partial_out, mask=mask, other=0.0, cache_modifier=".cg")
        new_highest = tl.maximum(highest, lse)
        faded, weight = tl.exp2(highest - new_highest), tl.exp2(lse - new_highest)
        total = total * faded + weight
        sums = sums * faded[:, None] + found * weight[:, None]
        highest = new_highest
        partial_out += head_rows * HEAD_DIM
        partial_lse += head_rows
    return sums / tl.where(total > 0.0, total, 1.0)[:, None]


def prefill_attention(
    q: Tensor,
    kv_pool: Tensor,
    layer: int,
    batch: AttentionBatch,
    *,
    scale: float,
    sliding_window: int | None,
    softcap: float | None,
    v_scale: float = 1.0,
    out: Tensor | None = None,
    tile: PrefillTile | None = None,
) -> Tensor:
    """`kernels.attention.paged_attention`; heads of a token lie side by side.

    `scale` includes that of keys in an 8-bit pool, the result is multiplied with `v_scale`,
    and written to `out` if it is given. `tile` is for benchmarks and tests.
    """
    if out is None:
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    for each in [tile] if tile is not None else prefill_tiles(q, kv_pool, batch, sliding_window):
        _attend(
            q,
            kv_pool,
            layer,
            batch,
            out,
            each,
            scale=scale,
            v_scale=v_scale,
            sliding_window=sliding_window,
            softcap=softcap,
        )
    return out


def _attend(
    q: Tensor,
    kv_pool: Tensor,
    layer: int,
    batch: AttentionBatch,
    out: Tensor,
    tile: PrefillTile,
    *,
    scale: float,
    v_scale: float,
    sliding_window: int | None,
    softcap: float | None,
) -> None:
    num_tokens, num_heads, head_dim = q.shape
    num_kv_heads, block_size = kv_pool.shape[3:5]
    group = num_heads // num_kv_heads
    rows = max(_MIN_ROWS, tile.rows, next_power_of_2(group))
    queries = rows // group
    has_parts = tile.parts > 1
    if has_parts and (batch.num_seqs > MAX_SEQS_IN_PARTS or tile.part_tokens % tile.tokens):
        raise ValueError(f"{tile} can't have parts, or not for {batch.num_seqs} sequences")
    num_tiles = num_tokens // queries + batch.num_seqs
    partial_out = partial_lse = arrivals = None
    if has_parts:
        shape = (tile.parts, num_tokens, num_heads, head_dim)
        partial_out = torch.empty(shape, dtype=torch.float32, device=q.device)
        partial_lse = torch.empty(shape[:3], dtype=torch.float32, device=q.device)
        arrivals = arrival_counters(num_tiles * num_kv_heads, q.device)
    launch(_prefill_kernel, (num_tiles, num_kv_heads, tile.parts))(
        q,
        kv_pool.select(1, layer),
        out,
        partial_out,
        partial_lse,
        arrivals,
        batch.query_starts,
        batch.kv_lens,
        batch.block_tables,
        batch.num_seqs,
        num_tokens,
        batch.block_tables.stride(0),
        q.stride(0),
        kv_pool.stride(0),
        kv_pool.stride(2),
        sliding_window or 2**31 - 1,
        scale,
        v_scale,
        softcap or 0.0,
        num_heads,
        GROUP=group,
        QUERIES=queries,
        ROWS=rows,
        HEAD_DIM=head_dim,
        DIM=next_power_of_2(head_dim),
        BLOCK_SIZE=block_size,
        TOKENS=tile.tokens,
        PART_TOKENS=tile.part_tokens if has_parts else 0,
        HAS_WINDOW=sliding_window is not None,
        HAS_SOFTCAP=softcap is not None,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        **launch_options(q.device),
    )
