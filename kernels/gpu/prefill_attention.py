"""Paged causal attention of several queries a sequence, decode rows among them.

A program takes a tile of rows: some consecutive queries of one sequence, each with all the query
heads that share a KV head, so that keys and values are read once for the group. It walks the
context in tiles of tokens, first those that every row sees, without a mask, then the rest.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.attention import AttentionBatch
from kernels.gpu.dependent_launch import (
    launch_options,
    let_successor_start,
    wait_for_predecessor,
)
from kernels.gpu.launching import launch
from kernels.gpu.sizes import next_power_of_2

_MIN_ROWS = 16
# The hardware's exponential is to base 2.
LOG2_E = tl.constexpr(1.4426950408889634)


@dataclass(frozen=True, slots=True)
class PrefillTile:
    """Rows and tokens of a tile, and how it is compiled."""

    rows: int
    tokens: int
    num_warps: int
    num_stages: int


def _tile(head_dim: int, element_bytes: int) -> PrefillTile:
    if element_bytes > 2:
        return PrefillTile(rows=32, tokens=32, num_warps=4, num_stages=1)
    if head_dim > 128:
        return PrefillTile(rows=64, tokens=64, num_warps=8, num_stages=2)
    return PrefillTile(rows=128, tokens=64, num_warps=4, num_stages=3)


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


@triton.jit(do_not_specialize=["num_seqs", "table_stride"])
def _prefill_kernel(
    q,
    pool,
    out,
    query_starts,
    kv_lens,
    block_tables,
    num_seqs,
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
    HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_predecessor(PDL)
    let_successor_start(PDL)
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
    if HAS_WINDOW:
        masked_start = tl.maximum(first_position - window + 1, 0) // TOKENS * TOKENS
    else:
        masked_start = (first_position + 1) // TOKENS * TOKENS
        highest, total, sums = _attend_tiles(
            query, head_pool, table, highest, total, sums, 0, masked_start, kv_len, positions,
            columns, block_stride, kv_stride, window, scale, softcap, HEAD_DIM, BLOCK_SIZE, TOKENS,
            IS_MASKED=False, HAS_WINDOW=HAS_WINDOW, HAS_SOFTCAP=HAS_SOFTCAP,
        )  # fmt: skip
    highest, total, sums = _attend_tiles(
        query, head_pool, table, highest, total, sums, masked_start, end, kv_len, positions,
        columns, block_stride, kv_stride, window, scale, softcap, HEAD_DIM, BLOCK_SIZE, TOKENS,
        IS_MASKED=True, HAS_WINDOW=HAS_WINDOW, HAS_SOFTCAP=HAS_SOFTCAP,
    )  # fmt: skip
    result = sums * (v_scale / tl.where(total > 0.0, total, 1.0))[:, None]
    at = (tokens[:, None] * num_heads + heads[:, None]) * HEAD_DIM + columns[None, :]
    tl.store(out + at, result, mask=mask)


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
    and written to `out` if it is given. `tile` is for benchmarks.
    """
    num_tokens, num_heads, head_dim = q.shape
    num_kv_heads, block_size = kv_pool.shape[3:5]
    group = num_heads // num_kv_heads
    tile = tile or _tile(head_dim, q.element_size())
    rows = max(_MIN_ROWS, tile.rows, next_power_of_2(group))
    queries = rows // group
    if out is None:
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    num_tiles = num_tokens // queries + batch.num_seqs
    launch(_prefill_kernel, (num_tiles, num_kv_heads))(
        q,
        kv_pool.select(1, layer),
        out,
        batch.query_starts,
        batch.kv_lens,
        batch.block_tables,
        batch.num_seqs,
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
        HAS_WINDOW=sliding_window is not None,
        HAS_SOFTCAP=softcap is not None,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        **launch_options(q.device),
    )
    return out
