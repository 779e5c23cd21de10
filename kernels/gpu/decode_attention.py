"""Paged attention of one query a sequence.

Reading keys and values is all the work here. A program reads those of one KV head once, for all
query heads of its group; which part of which context that is, is in `decode_plan`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.attention import AttentionBatch
from kernels.gpu.arrivals import arrival_counters
from kernels.gpu.decode_plan import (
    END,
    FIRST_PIECE,
    FIRST_VISIBLE,
    NUM_PARTS,
    POSITION,
    ROW,
    SEQ,
    SLOT,
    START,
    DecodePlan,
    plan_contexts,
)
from kernels.gpu.decode_rope import (
    NewTokens,
    load_halves,
    rotated_heads,
    store_new_token,
)
from kernels.gpu.dependent_launch import (
    LINE_BITS,
    launch_options,
    let_successor_start,
    prefetch_to_l2,
    wait_for_predecessor,
)
from kernels.gpu.launching import launch
from kernels.gpu.merge_attention import merge_parts
from kernels.gpu.saturating import bound_of, to_float16
from kernels.gpu.sizes import next_power_of_2
from kernels.gpu.turning import load_matrix, matrix_of
from kernels.gpu.widening import widened, widens_in_assembly
from kernels.kv_format import FP8_DTYPES
from kernels.turning import turns

# The fewest columns of a matrix instruction; smaller groups are padded to them.
_MIN_COLUMNS = 8
# The hardware's exponential is to base 2.
LOG2_E = tl.constexpr(1.4426950408889634)


# Steps with prompts have block tables of any width.
@triton.jit(do_not_specialize=["table_stride"])
def _decode_kernel(
    q,
    k,
    v,
    q_weight,
    k_weight,
    cos_sin,
    matrix,
    pool,
    out,
    partial_out,
    partial_lse,
    arrivals,
    pieces,
    block_tables,
    table_stride,
    q_stride,
    k_stride,
    v_stride,
    block_stride,
    kv_stride,
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
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TOKENS: tl.constexpr,
    PARTS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    USES_FLOAT16: tl.constexpr,
    IN_ASSEMBLY: tl.constexpr,
    IS_FP8: tl.constexpr,
    TURNS: tl.constexpr,
    PDL: tl.constexpr,
):
    kv_head = tl.program_id(0)
    piece = tl.program_id(1)
    planned = pieces + piece * ROW
    seq = tl.load(planned + SEQ)
    if seq < 0:
        return
    start = tl.load(planned + START)
    end = tl.load(planned + END)
    first = tl.load(planned + FIRST_VISIBLE)
    first_piece = tl.load(planned + FIRST_PIECE)
    num_parts = tl.load(planned + NUM_PARTS)
    # A tile's blocks are looked up before it's its turn: loads that wait for others in one turn of
    # the loop would have half as many stages each.
    table = block_tables + seq.to(tl.int64) * table_stride
    block = _blocks_of_tile(table, start, end, BLOCK_SIZE, TOKENS)
    if k is not None:
        position = tl.load(planned + POSITION).to(tl.int64)
        angles = cos_sin + position * HEAD_DIM + tl.arange(0, HEAD_DIM // 2)
        cos, sin = tl.load(angles)[None, :], tl.load(angles + HEAD_DIM // 2)[None, :]
        slot = tl.load(planned + SLOT).to(tl.int64)
        if TURNS:
            matrix = load_matrix(matrix, HEAD_DIM // 2)
    head_pool = pool + kv_head * BLOCK_SIZE * HEAD_DIM
    if PDL:
        # What the first turn of the loop reads was there before this step.
        line: tl.constexpr = LINE_BITS // pool.dtype.element_ty.primitive_bitwidth
        tokens = start + tl.arange(0, TOKENS)
        at = block.to(tl.int64) * block_stride + (tokens % BLOCK_SIZE) * HEAD_DIM
        for offset in tl.static_range(0, HEAD_DIM, line):
            prefetch_to_l2(head_pool + at + offset)
            prefetch_to_l2(head_pool + at + kv_stride + offset)
    wait_for_predecessor(PDL)
    let_successor_start(PDL)

    row = seq.to(tl.int64)
    in_group = tl.arange(0, HEADS)
    columns = tl.arange(0, DIM)
    heads = kv_head * GROUP + in_group
    is_head = in_group < GROUP
    is_column = columns < HEAD_DIM
    mask = is_head[:, None] & is_column[None, :]
    query_of_token = q + row * q_stride
    if k is None:
        query = tl.load(
            query_of_token + heads[:, None] * HEAD_DIM + columns[None, :], mask=mask, other=0.0
        )
    else:
        half: tl.constexpr = HEAD_DIM // 2
        dtype: tl.constexpr = q.dtype.element_ty
        # The new key is a row beside the queries where there is room: what is done to one is done
        # to all. All is loaded before any of it is waited for.
        is_beside: tl.constexpr = GROUP < HEADS
        key_row: tl.constexpr = GROUP if is_beside else 0
        is_key = (in_group == key_row)[:, None]
        key_of_token = k + row * k_stride + kv_head * HEAD_DIM + tl.zeros_like(heads)[:, None]
        new_value = tl.load(v + row * v_stride + kv_head * HEAD_DIM + tl.arange(0, HEAD_DIM))
        first_half, second_half = load_halves(
            query_of_token + heads[:, None] * HEAD_DIM, q_weight, eps, is_head[:, None], half
        )
        key_first, key_second = load_halves(key_of_token, k_weight, eps, is_key, half)
        if is_beside:
            first_half += key_first
            second_half += key_second
        keys = rotated_heads(first_half, second_half, cos, sin, matrix, dtype, IS_FP8, TURNS)
        query = keys.to(dtype)
        # A padded row of a captured graph has no slot.
        if piece == first_piece + num_parts - 1 and slot >= 0:
            if not is_beside:
                keys = rotated_heads(key_first, key_second, cos, sin, matrix, dtype, IS_FP8, TURNS)
            target = head_pool + (slot // BLOCK_SIZE) * block_stride
            store_new_token(
                keys, is_key, new_value, target + (slot % BLOCK_SIZE) * HEAD_DIM, kv_stride,
                k_factor, v_factor, largest, IS_FP8,
            )  # fmt: skip
    if USES_FLOAT16:
        query = to_float16(query.to(tl.float32) * scale)
        scale = 1.0
    highest = tl.full([HEADS], float("-inf"), tl.float32)
    total = tl.zeros([HEADS], tl.float32)
    # Tokens, and elements of values, are the rows of products, whose columns needn't be many.
    sums = tl.zeros([DIM, HEADS], tl.float32)
    for start_of_tile in range(start, end, TOKENS):
        tokens = start_of_tile + tl.arange(0, TOKENS)
        visible = (tokens >= first) & (tokens < end)
        at = block.to(tl.int64) * block_stride + (tokens % BLOCK_SIZE) * HEAD_DIM
        block = _blocks_of_tile(table, start_of_tile + TOKENS, end, BLOCK_SIZE, TOKENS)
        in_pool = head_pool + at[:, None] + columns[None, :]
        # What is not visible may be anything, NaN included.
        present = visible[:, None] & is_column[None, :]
        key = tl.load(in_pool, mask=present, other=0.0).to(query.dtype)
        scores = tl.dot(key, tl.trans(query), input_precision="ieee")
        if HAS_SOFTCAP:
            capped = 2.0 * tl.sigmoid(2.0 * scores * (scale / softcap)) - 1.0
            scores = softcap * capped * LOG2_E
        else:
            scores = scores * (scale * LOG2_E)
        scores = tl.where(visible[:, None], scores, float("-inf"))
        new_highest = tl.maximum(highest, tl.max(scores, 0))
        weights = tl.exp2(scores - new_highest[None, :])
        faded = tl.exp2(highest - new_highest)
        total = total * faded + tl.sum(weights, 0)
        value = tl.load(in_pool + kv_stride, mask=present, other=0.0)
        value = widened(value, query, IN_ASSEMBLY)
        sums = sums * faded[None, :]
        sums = tl.dot(tl.trans(value), weights.to(value.dtype), sums, input_precision="ieee")
        highest = new_highest

    # A padded row has no tokens: its sums are 0, and so is its output.
    total_or_one = tl.where(total > 0.0, total, 1.0)
    result = tl.trans(sums * (v_scale / total_or_one)[None, :])
    out_of_token = out + row * num_heads * HEAD_DIM
    at = heads[:, None] * HEAD_DIM + columns[None, :]
    if num_parts == 1:
        tl.store(out_of_token + at, result, mask=mask)
    else:
        tl.store(partial_out + piece * num_heads * HEAD_DIM + at, result, mask=mask)
        lse = tl.where(total > 0.0, highest + tl.log2(total_or_one), float("-inf"))
        tl.store(partial_lse + piece * num_heads + heads, lse, mask=is_head)
        # Every thread's part is written before the one that counts says so.
        tl.debug_barrier()
        counter = arrivals + row * tl.num_programs(0) + kv_head
        if tl.atomic_add(counter, 1, sem="acq_rel") == num_parts - 1:
            tl.debug_barrier()
            merge_parts(
                partial_out, partial_lse, out_of_token, num_heads, kv_head * GROUP, first_piece,
                num_parts, GROUP, PADDED_GROUP, HEAD_DIM, DIM, PARTS,
            )  # fmt: skip
            tl.store(counter, 0)


@triton.jit
def _blocks_of_tile(table, start, end, BLOCK_SIZE: tl.constexpr, TOKENS: tl.constexpr):
    """The block of each token from `start` on, before `end`."""
    tokens = start + tl.arange(0, TOKENS)
    return tl.load(table + tokens // BLOCK_SIZE, mask=tokens < end, other=0)


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
    plan: DecodePlan | None = None,
) -> Tensor:
    """`kernels.attention.paged_attention` where every sequence has one query.

    Heads of a token lie side by side. A sequence with a `kv_len` of 0 gets zeros. `scale` includes
    that of keys in an 8-bit pool, the result is multiplied with `v_scale`, and written to `out` if
    it is given. The kernel before this one on the stream may write neither `batch` nor the plan.

    With `new` tokens, queries aren't rotated yet, nor turned, nor are these stored: all of it is
    done on the way.
    `plan` is for tests and benchmarks; a step's is made by `kernels.attention.prepare`, and if
    neither is there, one is made on the spot.
    """
    num_seqs, num_heads, head_dim = q.shape
    num_kv_heads, block_size = kv_pool.shape[3:5]
    group = num_heads // num_kv_heads
    options = launch_options(q.device)
    plan = plan or batch.decode_plans.get(sliding_window)
    if plan is None:
        plan = plan_contexts(batch, kv_pool, sliding_window)
        # The kernel that makes it would be this one's predecessor, for which it doesn't wait early.
        options = {"PDL": False}
    if out is None:
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    tile, num_pieces = plan.tile, len(plan.pieces)
    # Pieces of divided contexts come first, and are no more than there are shares.
    num_parts = num_pieces - num_seqs
    dim, padded_group = next_power_of_2(head_dim), next_power_of_2(group)
    num_columns = max(_MIN_COLUMNS, padded_group)
    uses_8_bits = kv_pool.dtype in FP8_DTYPES
    uses_float16 = uses_8_bits and q.element_size() == 2
    norms = new and new.norms
    is_turned = new is not None and turns(kv_pool, head_dim)
    launch(_decode_kernel, (num_kv_heads, num_pieces))(
        q,
        new and new.k,
        new and new.v,
        norms and norms.q,
        norms and norms.k,
        new and new.cos_sin,
        matrix_of(head_dim, q.device) if is_turned else None,
        kv_pool.select(1, layer),
        out,
        torch.empty((num_parts, num_heads, head_dim), dtype=torch.float32, device=q.device),
        torch.empty((num_parts, num_heads), dtype=torch.float32, device=q.device),
        arrival_counters(num_seqs * num_kv_heads, q.device),
        plan.pieces,
        batch.block_tables,
        batch.block_tables.stride(0),
        q.stride(0),
        new.k.stride(0) if new else 0,
        new.v.stride(0) if new else 0,
        kv_pool.stride(0),
        kv_pool.stride(2),
        scale,
        v_scale,
        softcap or 0.0,
        norms and norms.eps,
        1.0 / new.kv_scales.k if new else 0.0,
        1.0 / new.kv_scales.v if new else 0.0,
        bound_of(kv_pool.dtype, kv_pool.device) if uses_8_bits else None,
        num_heads,
        GROUP=group,
        PADDED_GROUP=padded_group,
        HEADS=num_columns,
        HEAD_DIM=head_dim,
        DIM=dim,
        BLOCK_SIZE=block_size,
        TOKENS=tile.tokens,
        PARTS=max(1, tile.merged * 32 * tile.num_warps // (padded_group * dim)),
        HAS_SOFTCAP=softcap is not None,
        # The hardware widens 8 bits to float16 in one instruction, to bfloat16 in several.
        USES_FLOAT16=uses_float16,
        IN_ASSEMBLY=uses_float16 and widens_in_assembly(head_dim, num_columns, tile.num_warps),
        IS_FP8=uses_8_bits,
        TURNS=is_turned,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        **options,
    )
    return out
