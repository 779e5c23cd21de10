"""Paged causal attention of prompts: a warp that loads and two warpgroups that attend.

Each multiprocessor runs one program to the end, which takes tiles from a counter. A tile's rows
are some consecutive queries of one sequence, each with all the query heads that share a KV head.
The tensor memory accelerator brings queries, keys and values to shared memory, a pool's block at a
time, where the matrix instructions read them.
"""

# Gluon's compiler gives kernels their types, not Python.
# pyright: reportCallIssue=false, reportAssignmentType=false, reportGeneralTypeIssues=false

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from kernels.attention import AttentionBatch
from kernels.gpu.cards import num_multiprocessors
from kernels.gpu.hopper.attending import attend
from kernels.gpu.hopper.loading import LINE, NUM_SCALARS, ROWS, load
from kernels.gpu.launching import launch
from kernels.gpu.sizes import next_power_of_2
from kernels.gpu.widened_blocks import widen_blocks
from kernels.turning import turns

# The hardware's exponential is to base 2.
_LOG2_E = 1.4426950408889634
_TOKENS = 128
_STAGES = 2
_SLOTS = 2
_NUM_WARPGROUPS = 2
# Beyond, programs work on one KV head after the other, which stays in the L2 cache; up to here, on
# all at once, which leaves fewer of them idle at the end.
_LONG_CONTEXT = 4096
# What 3 warpgroups of 128 threads share, 2 of which give most of theirs to the others.
_REGISTERS = 168
ATTENDING_REGISTERS = gl.constexpr(240)
LOADING_REGISTERS = gl.constexpr(24)


@gluon.jit(
    do_not_specialize=[
        "positions", "num_seqs", "table_stride", "num_tiles", "num_blocks", "first_row",
        "heads_together",
    ]
)  # fmt: skip
def _hopper_attention_kernel(
    q_desc,
    kv_desc,
    out,
    cos_sin,
    query_starts,
    kv_lens,
    block_tables,
    positions,
    counter,
    num_seqs,
    table_stride,
    num_tiles,
    num_blocks,
    first_row,
    heads_together,
    scale,
    v_scale,
    num_heads,
    NUM_KV_HEADS: gl.constexpr,
    GROUP: gl.constexpr,
    PADDED_GROUP: gl.constexpr,
    QUERIES: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    BLOCK_SIZE: gl.constexpr,
    BOX: gl.constexpr,
    TOKENS: gl.constexpr,
    STAGES: gl.constexpr,
    SLOTS: gl.constexpr,
):
    num_lines: gl.constexpr = HEAD_DIM // LINE
    kv_shape: gl.constexpr = [STAGES * num_lines * (TOKENS // BOX), 1, 1, BOX, LINE]
    q_shape: gl.constexpr = [SLOTS * 2 * num_lines, ROWS // PADDED_GROUP, PADDED_GROUP, LINE]
    plain: gl.constexpr = mbarrier.MBarrierLayout()
    scalars = gl.allocate_shared_memory(gl.int32, [SLOTS * NUM_SCALARS, 1], plain)
    queries = gl.allocate_shared_memory(q_desc.dtype, q_shape, q_desc.layout)
    keys = gl.allocate_shared_memory(kv_desc.dtype, kv_shape, kv_desc.layout)
    values = gl.allocate_shared_memory(kv_desc.dtype, kv_shape, kv_desc.layout)
    # A buffer is full when its copies have arrived, and empty when both warpgroups say so.
    q_full = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], plain)
    q_empty = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], plain)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], plain)
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], plain)
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], plain)
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], plain)
    for slot in gl.static_range(SLOTS):
        mbarrier.init(q_full.index(slot), count=1)
        mbarrier.init(q_empty.index(slot), count=2)
    for stage in gl.static_range(STAGES):
        mbarrier.init(k_full.index(stage), count=1)
        mbarrier.init(k_empty.index(stage), count=2)
        mbarrier.init(v_full.index(stage), count=1)
        mbarrier.init(v_empty.index(stage), count=2)
    buffers = (scalars, queries, keys, values)
    barriers = (q_full, q_empty, k_full, k_empty, v_full, v_empty)
    gl.warp_specialize(
        [
            (
                attend,
                (
                    0, out, cos_sin, buffers, barriers, scale, v_scale, num_heads, GROUP,
                    PADDED_GROUP, QUERIES, HEAD_DIM, BOX, TOKENS, STAGES, SLOTS,
                ),
            ),
            (
                attend,
                (
                    1, out, cos_sin, buffers, barriers, scale, v_scale, num_heads, GROUP,
                    PADDED_GROUP, QUERIES, HEAD_DIM, BOX, TOKENS, STAGES, SLOTS,
                ),
            ),
            (
                load,
                (
                    q_desc, kv_desc, query_starts, kv_lens, block_tables, positions, counter,
                    num_seqs, table_stride, num_tiles, num_blocks, first_row, heads_together,
                    buffers, barriers, NUM_KV_HEADS, GROUP, QUERIES, HEAD_DIM, BLOCK_SIZE, BOX,
                    TOKENS, STAGES, SLOTS,
                ),
            ),
        ],
        [4, 1],
        [ATTENDING_REGISTERS, LOADING_REGISTERS],
    )  # fmt: skip


def hopper_attention(
    q: Tensor,
    kv_pool: Tensor,
    layer: int,
    batch: AttentionBatch,
    *,
    scale: float,
    v_scale: float = 1.0,
    cos_sin: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """`kernels.attention.paged_attention` where `is_supported` (support.py) says so; arguments as
    `prefill_attention`'s. With `cos_sin`, where `rotates_heads` does, queries are first rotated as
    by `kernels.rope.rope_and_store_kv`, but `q` stays as it is."""
    if kv_pool.dtype is not q.dtype:
        # Queries that are rotated here aren't turned: keys are turned back.
        turns_back = cos_sin is not None and turns(kv_pool, cos_sin.shape[1])
        kv_pool, batch = widen_blocks(kv_pool, layer, batch, q.dtype, turns_back=turns_back)
        layer = 0
    num_tokens, num_heads, head_dim = q.shape
    num_blocks, num_layers, _, num_kv_heads, block_size, _ = kv_pool.shape
    group = num_heads // num_kv_heads
    padded_group = next_power_of_2(group)
    num_queries = _NUM_WARPGROUPS * ROWS.value // padded_group
    num_tiles = num_tokens // num_queries + batch.num_seqs
    box = min(block_size, _TOKENS)
    block_rows, row_elements = num_layers * 2 * num_kv_heads, block_size * head_dim
    if out is None:
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    counter = torch.zeros(1, dtype=torch.int32, device=q.device)
    num_programs = min(num_multiprocessors(q.device), num_tiles * num_kv_heads)
    launch(_hopper_attention_kernel, (num_programs,))(
        TensorDescriptor(
            q,
            shape=[num_tokens, num_heads, head_dim],
            strides=[q.stride(0), head_dim, 1],
            block_shape=[ROWS.value // padded_group, padded_group, LINE.value],
            layout=gl.NVMMASharedLayout(128, 16, 3),
        ),
        TensorDescriptor(
            kv_pool,
            shape=[num_blocks, block_rows, block_size, head_dim],
            strides=[block_rows * row_elements, row_elements, head_dim, 1],
            block_shape=[1, 1, box, LINE.value],
            layout=gl.NVMMASharedLayout(128, 16, 4),
        ),
        out,
        cos_sin,
        batch.query_starts,
        batch.kv_lens,
        batch.block_tables,
        None if cos_sin is None else batch.positions,
        counter,
        batch.num_seqs,
        batch.block_tables.stride(0),
        num_tiles,
        num_blocks,
        layer * 2 * num_kv_heads,
        num_kv_heads if (batch.usual_kv_len or batch.max_kv_len) <= _LONG_CONTEXT else 1,
        scale * _LOG2_E,
        v_scale,
        num_heads,
        NUM_KV_HEADS=num_kv_heads,
        GROUP=group,
        PADDED_GROUP=padded_group,
        QUERIES=num_queries,
        HEAD_DIM=head_dim,
        BLOCK_SIZE=block_size,
        BOX=box,
        TOKENS=_TOKENS,
        STAGES=_STAGES,
        SLOTS=_SLOTS,
        num_warps=4,
        maxnreg=_REGISTERS,
    )
    return out
