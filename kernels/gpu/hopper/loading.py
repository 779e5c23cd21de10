"""The warp that loads: tiles of queries, and their keys and values block by block.

It takes tiles from a counter and runs ahead of the warpgroups that attend, as far as buffers are
empty. With each tile of queries it leaves what they must know of it, as scalars beside the tile.
"""

# Gluon's compiler gives these functions their types, not Python.
# pyright: reportCallIssue=false, reportAssignmentType=false, reportArgumentType=false
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false
# pyright: reportAttributeAccessIssue=false

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

# Rows of one warpgroup's matrix instruction, and elements of a swizzled line of shared memory.
ROWS = gl.constexpr(64)
LINE = gl.constexpr(64)
ELEMENT_BYTES = gl.constexpr(2)
# The scalars of a tile: its first row among all tokens, queries that its sequence has from there
# on, their first position, the sequence's tokens, the first query's row of the table of angles if
# queries are still to be rotated, and the KV head: -1 after the last tile.
FIRST_TOKEN = gl.constexpr(0)
NUM_LEFT = gl.constexpr(1)
FIRST_POSITION = gl.constexpr(2)
KV_LEN = gl.constexpr(3)
FIRST_ANGLES = gl.constexpr(4)
KV_HEAD = gl.constexpr(5)
NUM_SCALARS = gl.constexpr(6)


@gluon.jit
def _put_scalar(scalars, at, value):
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    scalars.index(at).store(gl.full([1], value, gl.int32, layout=layout))


@gluon.jit
def _sequence_of(query_starts, tile, num_seqs, QUERIES: gl.constexpr):
    """As in `kernels.gpu.prefill_attention`: sequence i's tiles start at
    `query_starts[i] // QUERIES + i`."""
    low = 0
    high = num_seqs
    while low < high:
        middle = (low + high) // 2
        first_tile = gl.load(query_starts + middle) // QUERIES + middle
        if first_tile <= tile:
            low = middle + 1
        else:
            high = middle
    return low - 1


@gluon.jit
def _copy_tokens(
    kv_desc,
    table,
    row,
    first,
    kv_len,
    num_blocks,
    boxes,
    full,
    stage,
    BLOCK_SIZE: gl.constexpr,
    BOX: gl.constexpr,
    TOKENS: gl.constexpr,
    num_lines: gl.constexpr,
):
    """Keys or values of the tokens from `first` on, row `row` of each block, to a stage's boxes.

    A tile of `[TOKENS, HEAD_DIM]` lies in shared memory as columns of swizzled lines, so each box
    of tokens within a column is one piece of it.
    """
    num_boxes: gl.constexpr = TOKENS // BOX
    for box in gl.static_range(num_boxes):
        token = first + box * BOX
        # Past the sequence's end a block that doesn't exist: it reads as zeros.
        block = gl.load(table + token // BLOCK_SIZE, mask=token < kv_len, other=num_blocks)
        for line in gl.static_range(num_lines):
            tma.async_copy_global_to_shared(
                kv_desc,
                [block, row, token % BLOCK_SIZE, line * LINE],
                full,
                boxes.index((stage * num_lines + line) * num_boxes + box),
            )


@gluon.jit
def load(
    q_desc,
    kv_desc,
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
    buffers,
    barriers,
    NUM_KV_HEADS: gl.constexpr,
    GROUP: gl.constexpr,
    QUERIES: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    BLOCK_SIZE: gl.constexpr,
    BOX: gl.constexpr,
    TOKENS: gl.constexpr,
    STAGES: gl.constexpr,
    SLOTS: gl.constexpr,
) -> None:
    scalars, queries, keys, values = buffers
    q_full, q_empty, k_full, k_empty, v_full, v_empty = barriers
    num_lines: gl.constexpr = HEAD_DIM // LINE
    tile_bytes: gl.constexpr = TOKENS * HEAD_DIM * ELEMENT_BYTES
    unit = gl.program_id(0)
    num_taken = 0
    count = 0
    while unit < num_tiles * NUM_KV_HEADS:
        # Late tiles see the longest contexts: they start first, short ones fill the gaps at the
        # end.
        units_together = num_tiles * heads_together
        within = unit % units_together
        tile = num_tiles - 1 - within // heads_together
        kv_head = unit // units_together * heads_together + within % heads_together
        seq = _sequence_of(query_starts, tile, num_seqs, QUERIES)
        seq_start = gl.load(query_starts + seq)
        num_queries = gl.load(query_starts + seq + 1) - seq_start
        first_query = (tile - (seq_start // QUERIES + seq)) * QUERIES
        if first_query < num_queries:
            kv_len = gl.load(kv_lens + seq)
            first_position = kv_len - num_queries + first_query
            slot = num_taken % SLOTS
            mbarrier.wait(q_empty.index(slot), (num_taken // SLOTS & 1) ^ 1)
            at = slot * NUM_SCALARS
            _put_scalar(scalars, at + FIRST_TOKEN, seq_start + first_query)
            _put_scalar(scalars, at + NUM_LEFT, num_queries - first_query)
            _put_scalar(scalars, at + FIRST_POSITION, first_position)
            _put_scalar(scalars, at + KV_LEN, kv_len)
            if positions is not None:
                angles = gl.load(positions + seq_start + first_query).to(gl.int32)
                _put_scalar(scalars, at + FIRST_ANGLES, angles)
            _put_scalar(scalars, at + KV_HEAD, kv_head)
            mbarrier.expect(q_full.index(slot), 2 * ROWS * HEAD_DIM * ELEMENT_BYTES)
            for half in gl.static_range(2):
                token = seq_start + first_query + half * (QUERIES // 2)
                for line in gl.static_range(num_lines):
                    tma.async_copy_global_to_shared(
                        q_desc,
                        [token, kv_head * GROUP, line * LINE],
                        q_full.index(slot),
                        queries.index((slot * 2 + half) * num_lines + line),
                    )
            num_taken += 1
            table = block_tables + seq.to(gl.int64) * table_stride
            end = gl.minimum(first_position + QUERIES, kv_len)
            num = (end + TOKENS - 1) // TOKENS
            row = first_row + kv_head
            for i in range(num):
                first = (num - 1 - i) * TOKENS
                stage = count % STAGES
                phase = (count // STAGES & 1) ^ 1
                mbarrier.wait(k_empty.index(stage), phase)
                mbarrier.expect(k_full.index(stage), tile_bytes)
                _copy_tokens(
                    kv_desc, table, row, first, kv_len, num_blocks, keys, k_full.index(stage),
                    stage, BLOCK_SIZE, BOX, TOKENS, num_lines,
                )  # fmt: skip
                mbarrier.wait(v_empty.index(stage), phase)
                mbarrier.expect(v_full.index(stage), tile_bytes)
                _copy_tokens(
                    kv_desc, table, row + NUM_KV_HEADS, first, kv_len, num_blocks, values,
                    v_full.index(stage), stage, BLOCK_SIZE, BOX, TOKENS, num_lines,
                )  # fmt: skip
                count += 1
        unit = gl.num_programs(0) + gl.atomic_add(counter, 1)
    slot = num_taken % SLOTS
    mbarrier.wait(q_empty.index(slot), (num_taken // SLOTS & 1) ^ 1)
    _put_scalar(scalars, slot * NUM_SCALARS + KV_HEAD, -1)
    mbarrier.arrive(q_full.index(slot), count=1)
