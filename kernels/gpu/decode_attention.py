"""Paged attention of one query a sequence: split over the context, merged afterwards.

Reading keys and values is all the work here. A program reads those of one KV head once, for all
query heads of its group; where sequences and heads are too few to fill the card, the context of
each is split over several programs, and a second kernel merges what they found.
"""

# A launch takes compile options beside the kernel's arguments.
# pyright: reportCallIssue=false

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
from kernels.gpu.sizes import next_power_of_2

# The least side of a matrix instruction; smaller groups are padded to it.
_MIN_ROWS = 16
# The hardware's exponential is to base 2.
LOG2_E = tl.constexpr(1.4426950408889634)
_MAX_SPLITS = 64
# Programs on the card at a time that keep its memory busy, over those that start one after another.
_PROGRAMS_PER_PROCESSOR = 4


@dataclass(frozen=True, slots=True)
class _Tile:
    """Tokens a program takes at a time, and how it is compiled."""

    tokens: int
    num_warps: int
    num_stages: int


def _tile(head_dim: int, element_bytes: int) -> _Tile:
    if head_dim * element_bytes > 256:
        return _Tile(tokens=32, num_warps=4, num_stages=2)
    return _Tile(tokens=64, num_warps=4, num_stages=3)


@triton.jit
def _decode_kernel(
    q,
    pool,
    out,
    partial_out,
    partial_lse,
    kv_lens,
    block_tables,
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
    ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TOKENS: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_predecessor(PDL)
    let_successor_start(PDL)
    # Splits of one sequence and head are neighbours: they end together.
    split = tl.program_id(0)
    kv_head = tl.program_id(1)
    seq = tl.program_id(2).to(tl.int64)
    kv_len = tl.load(kv_lens + seq)
    first = tl.maximum(kv_len - window, 0)
    first_tile = first // TOKENS
    tiles_per_split = tl.cdiv(tl.cdiv(kv_len, TOKENS) - first_tile, NUM_SPLITS)
    tile = first_tile + split * tiles_per_split
    end = tl.minimum((tile + tiles_per_split) * TOKENS, kv_len)

    rows = tl.arange(0, ROWS)
    columns = tl.arange(0, DIM)
    heads = kv_head * GROUP + rows
    mask = (rows < GROUP)[:, None] & (columns < HEAD_DIM)[None, :]
    query = tl.load(
        q + seq * q_stride + heads[:, None] * HEAD_DIM + columns[None, :], mask=mask, other=0.0
    )
    table = block_tables + seq * table_stride
    head_pool = pool + kv_head * BLOCK_SIZE * HEAD_DIM

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
            scores = softcap * _tanh(scores * (scale / softcap)) * LOG2_E
        else:
            scores = scores * (scale * LOG2_E)
        scores = tl.where(visible[None, :], scores, float("-inf"))
        new_highest = tl.maximum(highest, tl.max(scores, 1))
        weights = tl.exp2(scores - new_highest[:, None])
        faded = tl.exp2(highest - new_highest)
        total = total * faded + tl.sum(weights, 1)
        value = tl.load(in_pool + kv_stride, mask=present, other=0.0).to(query.dtype)
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


@triton.jit
def _tanh(x):
    return 2.0 * tl.sigmoid(2.0 * x) - 1.0


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


def num_splits(num_seqs: int, num_kv_heads: int, max_kv_len: int, device: torch.device) -> int:
    """Programs a sequence and head, a power of two, so that the card is full and few idle."""
    if device.type != "cuda":
        return 4
    programs = _PROGRAMS_PER_PROCESSOR * _num_processors(device)
    wanted = max(1, programs // (num_seqs * num_kv_heads))
    useful = max(1, max_kv_len // 128)
    return min(_MAX_SPLITS, 1 << (min(wanted, useful).bit_length() - 1))


def _num_processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


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
) -> Tensor:
    """`kernels.attention.paged_attention` where every sequence has one query.

    Heads of a token lie side by side. A sequence with a `kv_len` of 0 gets zeros. `scale` includes
    that of keys in an 8-bit pool, the result is multiplied with `v_scale`.
    """
    num_seqs, num_heads, head_dim = q.shape
    num_kv_heads, block_size = kv_pool.shape[3:5]
    group = num_heads // num_kv_heads
    splits = num_splits(num_seqs, num_kv_heads, batch.max_kv_len, q.device)
    out = torch.empty((num_seqs, num_heads, head_dim), dtype=q.dtype, device=q.device)
    partial_out, partial_lse = out, out
    if splits > 1:
        shape = (num_seqs, num_heads, splits)
        partial_out = torch.empty((*shape, head_dim), dtype=torch.float32, device=q.device)
        partial_lse = torch.empty(shape, dtype=torch.float32, device=q.device)
    dim = next_power_of_2(head_dim)
    tile = _tile(head_dim, q.element_size())
    _decode_kernel[(splits, num_kv_heads, num_seqs)](
        q,
        kv_pool.select(1, layer),
        out,
        partial_out,
        partial_lse,
        batch.kv_lens,
        batch.block_tables,
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
        ROWS=max(_MIN_ROWS, next_power_of_2(group)),
        HEAD_DIM=head_dim,
        DIM=dim,
        BLOCK_SIZE=block_size,
        TOKENS=tile.tokens,
        NUM_SPLITS=splits,
        HAS_SOFTCAP=softcap is not None,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        **launch_options(q.device),
    )
    if splits > 1:
        _merge_kernel[(num_seqs * num_heads,)](
            partial_out,
            partial_lse,
            out,
            HEAD_DIM=head_dim,
            DIM=dim,
            NUM_SPLITS=splits,
            SPLITS=next_power_of_2(splits),
            num_warps=4,
            **launch_options(q.device),
        )
    return out
