"""Paged attention of one query a sequence: split over the context, merged afterwards.

Reading keys and values is all the work here. A program reads those of one KV head once, for all
query heads of its group; where sequences and heads are too few to fill the card, the context of
each is split over several programs, and the last of them to finish merges what they found.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.attention import AttentionBatch
from kernels.gpu.arrivals import arrival_counters
from kernels.gpu.decode_prefetch import prefetch_norms, prefetch_tiles
from kernels.gpu.decode_rope import NewTokens, rotated_query, store_new_token
from kernels.gpu.decode_tiles import (
    ASSEMBLY_HEAD_DIM,
    MAX_FUSED_SPLITS,
    DecodeTile,
    splits_for,
    tile_for,
)
from kernels.gpu.dependent_launch import (
    launch_options,
    let_successor_start,
    wait_for_predecessor,
)
from kernels.gpu.launching import launch
from kernels.gpu.merge_attention import merge_attention, merge_group, parts_at_once
from kernels.gpu.sizes import next_power_of_2
from kernels.gpu.widening import widened
from kernels.kv_format import FP8_DTYPES

# The least side of a matrix instruction; smaller groups are padded to it.
_MIN_ROWS = 16
# The hardware's exponential is to base 2.
LOG2_E = tl.constexpr(1.4426950408889634)
LARGEST_FLOAT16 = tl.constexpr(65504.0)


# Steps with prompts have block tables of any width.
@triton.jit(do_not_specialize=["table_stride"])
def _decode_kernel(
    q,
    k,
    v,
    q_weight,
    k_weight,
    cos_sin,
    positions,
    slots,
    pool,
    out,
    partial_out,
    partial_lse,
    arrivals,
    kv_lens,
    block_tables,
    table_stride,
    q_stride,
    k_stride,
    v_stride,
    block_stride,
    kv_stride,
    window,
    scale,
    v_scale,
    softcap,
    eps,
    k_factor,
    v_factor,
    largest,
    num_heads,
    GROUP: tl.constexpr,
    PADDED_GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TOKENS: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    PARTS: tl.constexpr,
    PREFETCHED: tl.constexpr,
    IS_FUSED: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    USES_FLOAT16: tl.constexpr,
    IN_ASSEMBLY: tl.constexpr,
    IS_FP8: tl.constexpr,
    PDL: tl.constexpr,
):
    # Splits of one sequence and head are neighbours: they end together.
    split = tl.program_id(0)
    kv_head = tl.program_id(1)
    seq = tl.program_id(2).to(tl.int64)
    table = block_tables + seq * table_stride
    head_pool = pool + kv_head * BLOCK_SIZE * HEAD_DIM
    kv_len = tl.load(kv_lens + seq)
    first = tl.maximum(kv_len - window, 0)
    first_tile = first // TOKENS
    num_tiles = tl.cdiv(kv_len, TOKENS) - first_tile
    tiles_per_split = tl.cdiv(num_tiles, NUM_SPLITS)
    tile = first_tile + split * tiles_per_split
    end = tl.minimum((tile + tiles_per_split) * TOKENS, kv_len)
    if PDL and tile * TOKENS < end:
        # The newest token's are being written, but most are there since long ago.
        prefetch_tiles(
            head_pool, table, tile, first, end, block_stride, kv_stride,
            PREFETCHED, TOKENS, BLOCK_SIZE, HEAD_DIM,
        )  # fmt: skip
    if k is not None:
        angles = cos_sin + tl.load(positions + seq) * HEAD_DIM + tl.arange(0, HEAD_DIM // 2)
        cos, sin = tl.load(angles), tl.load(angles + HEAD_DIM // 2)
        slot = tl.load(slots + seq)
    prefetch_norms(q_weight, k_weight, HEAD_DIM, PDL)
    wait_for_predecessor(PDL)
    let_successor_start(PDL)
    num_parts = tl.maximum(tl.cdiv(num_tiles, tl.maximum(tiles_per_split, 1)), 1)
    if IS_FUSED and split >= num_parts:
        return

    rows = tl.arange(0, ROWS)
    columns = tl.arange(0, DIM)
    heads = kv_head * GROUP + rows
    mask = (rows < GROUP)[:, None] & (columns < HEAD_DIM)[None, :]
    heads_of_token = q + seq * q_stride
    if k is None:
        query = tl.load(
            heads_of_token + heads[:, None] * HEAD_DIM + columns[None, :], mask=mask, other=0.0
        )
    else:
        query = rotated_query(
            heads_of_token, q_weight, eps, heads, rows < GROUP, cos, sin, HEAD_DIM // 2
        )
        # A padded row of a captured graph has no slot.
        if split == num_parts - 1 and slot >= 0:
            target = head_pool + (slot // BLOCK_SIZE) * block_stride
            store_new_token(
                k + seq * k_stride + kv_head * HEAD_DIM, v + seq * v_stride + kv_head * HEAD_DIM,
                k_weight, eps, target + (slot % BLOCK_SIZE) * HEAD_DIM, kv_stride, cos, sin,
                k_factor, v_factor, largest, HEAD_DIM // 2, IS_FP8,
            )  # fmt: skip
    if USES_FLOAT16:
        scaled = tl.clamp(query.to(tl.float32) * scale, -LARGEST_FLOAT16, LARGEST_FLOAT16)
        query = scaled.to(tl.float16)
        scale = 1.0
    highest = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    sums = tl.zeros([ROWS, DIM], tl.float32)
    for start in range(tile * TOKENS, end, TOKENS):
        tokens = start + tl.arange(0, TOKENS)
        visible = (tokens >= first) & (tokens < end)
        block = tl.load(table + tokens // BLOCK_SIZE, mask=visible, other=0).to(tl.int64)
        at = block * block_stride + (tokens % BLOCK_SIZE) * HEAD_DIM
        in_pool = head_pool + at[:, None] + columns[None, :]
        # What is not visible may be anything, NaN included.
        present = visible[:, None] & (columns < HEAD_DIM)[None, :]
        key = tl.load(in_pool, mask=present, other=0.0).to(query.dtype)
        scores = tl.dot(query, tl.trans(key), input_precision="ieee")
        if HAS_SOFTCAP:
            capped = 2.0 * tl.sigmoid(2.0 * scores * (scale / softcap)) - 1.0
            scores = softcap * capped * LOG2_E
        else:
            scores = scores * (scale * LOG2_E)
        scores = tl.where(visible[None, :], scores, float("-inf"))
        new_highest = tl.maximum(highest, tl.max(scores, 1))
        weights = tl.exp2(scores - new_highest[:, None])
        faded = tl.exp2(highest - new_highest)
        total = total * faded + tl.sum(weights, 1)
        value = tl.load(in_pool + kv_stride, mask=present, other=0.0)
        value = widened(value, query, IN_ASSEMBLY)
        sums = sums * faded[:, None]
        sums = tl.dot(weights.to(value.dtype), value, sums, input_precision="ieee")
        highest = new_highest

    # A padded row has no tokens: its sums are 0, and so is its output.
    total_or_one = tl.where(total > 0.0, total, 1.0)
    result = sums * (v_scale / total_or_one)[:, None]
    if NUM_SPLITS == 1:
        at = (seq * num_heads + heads[:, None]) * HEAD_DIM + columns[None, :]
        tl.store(out + at, result, mask=mask)
    else:
        part = (seq * num_heads + heads) * NUM_SPLITS + split
        tl.store(partial_out + part[:, None] * HEAD_DIM + columns[None, :], result, mask=mask)
        lse = tl.where(total > 0.0, highest + tl.log2(total_or_one), float("-inf"))
        tl.store(partial_lse + part, lse, mask=rows < GROUP)
        if IS_FUSED:
            # Every thread's part is written before the one that counts says so.
            tl.debug_barrier()
            pair = seq * tl.num_programs(1) + kv_head
            arrived = tl.atomic_add(arrivals + pair, 1, sem="acq_rel")
            if arrived == num_parts - 1:
                tl.debug_barrier()
                merge_group(
                    partial_out, partial_lse, out, seq * num_heads + kv_head * GROUP, num_parts,
                    GROUP, PADDED_GROUP, HEAD_DIM, DIM, NUM_SPLITS, PARTS,
                )  # fmt: skip
                tl.store(arrivals + pair, 0)


def decode_attention(
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
    new: NewTokens | None = None,
    num_splits: int | None = None,
    tile: DecodeTile | None = None,
    is_fused: bool | None = None,
) -> Tensor:
    """`kernels.attention.paged_attention` where every sequence has one query.

    Heads of a token lie side by side. A sequence with a `kv_len` of 0 gets zeros. `scale` includes
    that of keys in an 8-bit pool, the result is multiplied with `v_scale`, and written to `out` if
    it is given. The kernel before this one on the stream may not write `batch`.

    With `new` tokens, queries aren't rotated yet, nor are these stored: both is done on the way.
    `num_splits`, a power of two, `tile` and `is_fused`, or else a second kernel merges, are for
    tests and benchmarks.
    """
    num_seqs, num_heads, head_dim = q.shape
    num_kv_heads, block_size = kv_pool.shape[3:5]
    group = num_heads // num_kv_heads
    num_pairs = num_seqs * num_kv_heads
    splits = num_splits or splits_for(num_pairs, batch.max_kv_len, kv_pool)
    tile = tile or tile_for(head_dim, kv_pool.element_size(), num_pairs)
    if is_fused is None:
        is_fused = splits <= MAX_FUSED_SPLITS
    if out is None:
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    partial_out, partial_lse, arrivals = out, out, out
    if splits > 1:
        shape = (num_seqs, num_heads, splits)
        partial_out = torch.empty((*shape, head_dim), dtype=torch.float32, device=q.device)
        partial_lse = torch.empty(shape, dtype=torch.float32, device=q.device)
        if is_fused:
            arrivals = arrival_counters(num_pairs, q.device)
    dim, padded_group = next_power_of_2(head_dim), next_power_of_2(group)
    uses_float16 = kv_pool.dtype in FP8_DTYPES and q.element_size() == 2
    norms = new and new.norms
    launch(_decode_kernel, (splits, num_kv_heads, num_seqs))(
        q,
        new and new.k,
        new and new.v,
        norms and norms.q,
        norms and norms.k,
        new and new.cos_sin,
        batch.positions,
        batch.slots,
        kv_pool.select(1, layer),
        out,
        partial_out,
        partial_lse,
        arrivals,
        batch.kv_lens,
        batch.block_tables,
        batch.block_tables.stride(0),
        q.stride(0),
        new.k.stride(0) if new else 0,
        new.v.stride(0) if new else 0,
        kv_pool.stride(0),
        kv_pool.stride(2),
        sliding_window or 2**31 - 1,
        scale,
        v_scale,
        softcap or 0.0,
        norms and norms.eps,
        1.0 / new.kv_scales.k if new else 0.0,
        1.0 / new.kv_scales.v if new else 0.0,
        torch.finfo(kv_pool.dtype).max,
        num_heads,
        GROUP=group,
        PADDED_GROUP=padded_group,
        ROWS=max(_MIN_ROWS, padded_group),
        HEAD_DIM=head_dim,
        DIM=dim,
        BLOCK_SIZE=block_size,
        TOKENS=tile.tokens,
        NUM_SPLITS=splits,
        PARTS=min(splits, parts_at_once(padded_group * dim, tile.num_warps)),
        PREFETCHED=tile.prefetched,
        IS_FUSED=splits > 1 and is_fused,
        HAS_SOFTCAP=softcap is not None,
        # The hardware widens 8 bits to float16 in one instruction, to bfloat16 in several.
        USES_FLOAT16=uses_float16,
        IN_ASSEMBLY=uses_float16 and q.is_cuda and head_dim == ASSEMBLY_HEAD_DIM,
        IS_FP8=kv_pool.dtype in FP8_DTYPES,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        **launch_options(q.device),
    )
    if splits > 1 and not is_fused:
        merge_attention(partial_out, partial_lse, out)
    return out
