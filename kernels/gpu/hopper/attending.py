"""A warpgroup that attends, for half of the rows of each tile.

The softmax of a tile of tokens runs while the matrix units work on the weighted sum of the tile
before it and, for the other warpgroup, on scores. Tokens are walked backwards: only the first one
or two tiles have some that a row must not see. Before that, queries may be rotated where they lie.
"""

# Gluon has no public way to see pieces of shared memory as one tile.
# ruff: noqa: SLF001
# Gluon's compiler gives these functions their types, not Python.
# pyright: reportCallIssue=false, reportAssignmentType=false, reportArgumentType=false
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false
# pyright: reportAttributeAccessIssue=false

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)

from kernels.gpu.hopper.loading import (
    FIRST_ANGLES,
    FIRST_POSITION,
    FIRST_TOKEN,
    KV_HEAD,
    KV_LEN,
    LINE,
    NUM_LEFT,
    NUM_SCALARS,
    ROWS,
)

# Below every score; not infinite, so that a row which has seen nothing yet needs no case, and a
# power of two, so that its product with the scale is the same rounded or fused.
UNSEEN = gl.constexpr(-(2.0**100))


@gluon.jit
def _get_scalar(scalars, at):
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    return gl.max(scalars.index(at).load(layout), 0)


@gluon.jit
def _zero_past_end(
    boxes,
    stage,
    first,
    kv_len,
    BOX: gl.constexpr,
    TOKENS: gl.constexpr,
    num_lines: gl.constexpr,
):
    """Values of the block that a sequence ends in: past the end they may be anything, NaN
    included, and a weight of 0 doesn't help against NaN. Both warpgroups write the same."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    num_boxes: gl.constexpr = TOKENS // BOX
    flat = boxes._reinterpret(
        boxes.dtype, [boxes.shape[0], BOX, LINE], gl.NVMMASharedLayout(128, 16, 2)
    )
    rows = gl.arange(0, BOX, layout=gl.SliceLayout(1, layout))
    for line in gl.static_range(num_lines):
        box = flat.index((stage * num_lines + line) * num_boxes + (kv_len - first) // BOX)
        box.store(gl.where((rows < kv_len % BOX)[:, None], box.load(layout), 0.0))
    fence_async_shared()


@gluon.constexpr_function
def _rotation_layout(group: int) -> gl.BlockedLayout:
    """Of [queries, heads, elements]: 8 elements, 16 bytes, of up to 4 heads a thread, which rotate
    by the same angles. Each element is one thread's: two would rotate it twice."""
    heads = min(group, 4)
    lanes = min(group // heads, 4)
    warps = group // heads // lanes
    return gl.BlockedLayout(
        [1, heads, 8], [4 // lanes, lanes, 8], [4 // warps, warps, 1], [2, 1, 0]
    )


@gluon.jit
def _rotate(
    boxes, first_box, cos_sin, first_row, first_query, num_left, PADDED_GROUP: gl.constexpr
):
    """RoPE of a warpgroup's queries in shared memory, to the bit as `kernels.gpu.rope` does it: a
    head's halves are a line each, in two boxes. Queries past the sequence's end rotate as its last
    one."""
    layout: gl.constexpr = _rotation_layout(PADDED_GROUP)
    angle_layout: gl.constexpr = gl.SliceLayout(1, layout)
    queries = gl.arange(0, ROWS // PADDED_GROUP, layout=gl.SliceLayout(1, angle_layout))
    columns = gl.arange(0, LINE, layout=gl.SliceLayout(0, angle_layout))
    row = first_row + gl.minimum(first_query + queries, num_left - 1)
    angles = cos_sin + row[:, None] * (2 * LINE) + columns[None, :]
    cos = gl.load(angles).expand_dims(1)
    sin = gl.load(angles + LINE).expand_dims(1)
    first_half, second_half = boxes.index(first_box), boxes.index(first_box + 1)
    first = first_half.load(layout).to(gl.float32)
    second = second_half.load(layout).to(gl.float32)
    first_half.store(gl.fma(first, cos, -(second * sin)).to(boxes.dtype))
    second_half.store(gl.fma(second, cos, first * sin).to(boxes.dtype))
    fence_async_shared()


@gluon.jit
def _mask(scores, first, positions, TOKENS: gl.constexpr, layout: gl.constexpr):
    tokens = gl.arange(0, TOKENS, layout=gl.SliceLayout(0, layout))
    return gl.where((positions - first)[:, None] >= tokens[None, :], scores, UNSEEN)


@gluon.jit
def _softmax(scores, highest, total, scale):
    """Weights of a tile, the new maxima and totals, and how far earlier sums fade."""
    new_highest = gl.maximum(highest, gl.max(scores, 1))
    subtracted = new_highest * scale
    faded = gl.exp2(highest * scale - subtracted)
    weights = gl.exp2(scores * scale - subtracted[:, None])
    return weights, new_highest, total * faded + gl.sum(weights, 1), faded


@gluon.jit
def _as_operand(weights, dtype: gl.constexpr, operand: gl.constexpr):
    """Weights as the matrix instruction takes them: a thread keeps what it has.

    Rounded here, by pairs, they go there as they are: as tensors of 16 bits they would be taken
    apart and put together again, four instructions a pair.
    """
    weights = gl.convert_layout(weights, operand, assert_trivial=True)
    if dtype == gl.bfloat16:
        rounded = gl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $2, $1;",
            "=r,f,f", [weights], dtype=gl.bfloat16, is_pure=True, pack=2,
        )  # fmt: skip
    else:
        rounded = gl.inline_asm_elementwise(
            "cvt.rn.f16x2.f32 $0, $2, $1;",
            "=r,f,f", [weights], dtype=gl.float16, is_pure=True, pack=2,
        )  # fmt: skip
    return rounded


@gluon.jit
def _start_scores(query, keys, full, count, TOKENS: gl.constexpr, STAGES: gl.constexpr,
                  layout: gl.constexpr):  # fmt: skip
    stage = count % STAGES
    mbarrier.wait(full.index(stage), count // STAGES & 1)
    zeros = warpgroup_mma_init(gl.zeros([ROWS, TOKENS], gl.float32, layout=layout))
    key = keys.index(stage).permute((1, 0))
    return warpgroup_mma(query, key, zeros, use_acc=False, is_async=True)


@gluon.jit
def _step(
    query,
    keys,
    values,
    barriers,
    weights,
    sums,
    highest,
    total,
    count,
    first,
    positions,
    scale,
    TOKENS: gl.constexpr,
    STAGES: gl.constexpr,
    layout: gl.constexpr,
    operand: gl.constexpr,
    IS_MASKED: gl.constexpr,
):
    """Scores and weights of tile `count`, and the weighted sum of the tile before it.

    Weights stay in float32 from step to step; rounded at the start of the next one, they need
    fewer registers than beside the scores.
    """
    k_full, k_empty, v_full, v_empty = barriers
    before = (count - 1) % STAGES
    weights = _as_operand(weights, keys.dtype, operand)
    scores = _start_scores(query, keys, k_full, count, TOKENS, STAGES, layout)
    mbarrier.wait(v_full.index(before), (count - 1) // STAGES & 1)
    sums = warpgroup_mma(weights, values.index(before), sums, is_async=True)
    scores = warpgroup_mma_wait(1, deps=[scores])
    mbarrier.arrive(k_empty.index(count % STAGES), count=1)
    if IS_MASKED:
        scores = _mask(scores, first, positions, TOKENS, layout)
    new_weights, highest, total, faded = _softmax(scores, highest, total, scale)
    sums = warpgroup_mma_wait(0, deps=[sums])
    mbarrier.arrive(v_empty.index(before), count=1)
    sums = sums * gl.convert_layout(faded, gl.SliceLayout(1, operand.parent))[:, None]
    return new_weights, sums, highest, total


@gluon.jit
def attend(
    half: gl.constexpr,
    out,
    cos_sin,
    buffers,
    barriers,
    scale,
    v_scale,
    num_heads,
    GROUP: gl.constexpr,
    PADDED_GROUP: gl.constexpr,
    QUERIES: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    BOX: gl.constexpr,
    TOKENS: gl.constexpr,
    STAGES: gl.constexpr,
    SLOTS: gl.constexpr,
) -> None:
    scalars, query_boxes, key_boxes, value_boxes = buffers
    q_full, q_empty, k_full, k_empty, v_full, v_empty = barriers
    dtype: gl.constexpr = key_boxes.dtype
    swizzled: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TOKENS, 16])
    sum_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_DIM, 16])
    operand: gl.constexpr = gl.DotOperandLayout(0, sum_layout, 2)
    row_layout: gl.constexpr = gl.SliceLayout(1, layout)
    store_layout: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0])
    queries = query_boxes._reinterpret(dtype, [SLOTS * 2, ROWS, HEAD_DIM], swizzled)
    keys = key_boxes._reinterpret(dtype, [STAGES, TOKENS, HEAD_DIM], swizzled)
    values = value_boxes._reinterpret(dtype, [STAGES, TOKENS, HEAD_DIM], swizzled)
    kv_barriers = (k_full, k_empty, v_full, v_empty)
    my_first: gl.constexpr = half * (QUERIES // 2)
    my_queries = my_first + gl.arange(0, ROWS, layout=row_layout) // PADDED_GROUP

    num_taken = 0
    count = 0
    mbarrier.wait(q_full.index(0), 0)
    kv_head = _get_scalar(scalars, KV_HEAD)
    while kv_head >= 0:
        slot = num_taken % SLOTS
        first_token = _get_scalar(scalars, slot * NUM_SCALARS + FIRST_TOKEN)
        num_left = _get_scalar(scalars, slot * NUM_SCALARS + NUM_LEFT)
        first_position = _get_scalar(scalars, slot * NUM_SCALARS + FIRST_POSITION)
        kv_len = _get_scalar(scalars, slot * NUM_SCALARS + KV_LEN)
        query = queries.index(slot * 2 + half)
        if cos_sin is not None:
            first_angles = _get_scalar(scalars, slot * NUM_SCALARS + FIRST_ANGLES)
            first_box = (slot * 2 + half) * (HEAD_DIM // LINE)
            _rotate(query_boxes, first_box, cos_sin, first_angles, my_first, num_left, PADDED_GROUP)
        positions = first_position + my_queries
        end = gl.minimum(first_position + QUERIES, kv_len)
        num = (end + TOKENS - 1) // TOKENS
        num_clear = gl.minimum((first_position + my_first + 1) // TOKENS, num - 1)
        first = (num - 1) * TOKENS

        scores = _start_scores(query, keys, k_full, count, TOKENS, STAGES, layout)
        scores = warpgroup_mma_wait(0, deps=[scores])
        stage = count % STAGES
        mbarrier.arrive(k_empty.index(stage), count=1)
        scores = _mask(scores, first, positions, TOKENS, layout)
        highest = gl.full([ROWS], UNSEEN, gl.float32, layout=row_layout)
        total = gl.zeros([ROWS], gl.float32, layout=row_layout)
        weights, highest, total, _ = _softmax(scores, highest, total, scale)
        sums = gl.zeros([ROWS, HEAD_DIM], gl.float32, layout=sum_layout)
        if (kv_len < first + TOKENS) & (kv_len % BOX != 0):
            mbarrier.wait(v_full.index(stage), count // STAGES & 1)
            _zero_past_end(value_boxes, stage, first, kv_len, BOX, TOKENS, HEAD_DIM // LINE)
        count += 1
        for i in range(1, num - num_clear):
            weights, sums, highest, total = _step(
                query, keys, values, kv_barriers, weights, sums, highest, total, count,
                first - i * TOKENS, positions, scale, TOKENS, STAGES, layout, operand,
                IS_MASKED=True,
            )  # fmt: skip
            count += 1
        for _ in range(num_clear):
            weights, sums, highest, total = _step(
                query, keys, values, kv_barriers, weights, sums, highest, total, count,
                0, positions, scale, TOKENS, STAGES, layout, operand,
                IS_MASKED=False,
            )  # fmt: skip
            count += 1
        mbarrier.arrive(q_empty.index(slot), count=1)
        last = (count - 1) % STAGES
        mbarrier.wait(v_full.index(last), (count - 1) // STAGES & 1)
        weights = _as_operand(weights, dtype, operand)
        sums = warpgroup_mma(weights, values.index(last), sums, is_async=True)
        sums = warpgroup_mma_wait(0, deps=[sums])
        mbarrier.arrive(v_empty.index(last), count=1)

        total = gl.convert_layout(total, gl.SliceLayout(1, sum_layout))
        result = gl.convert_layout((sums * (v_scale / total)[:, None]).to(dtype), store_layout)
        rows = gl.arange(0, ROWS, layout=gl.SliceLayout(1, store_layout))
        columns = gl.arange(0, HEAD_DIM, layout=gl.SliceLayout(0, store_layout))
        query_at = my_first + rows // PADDED_GROUP
        head = rows % PADDED_GROUP
        is_row = (query_at < num_left) & (head < GROUP)
        at = (first_token + query_at).to(gl.int64) * num_heads + kv_head * GROUP + head
        gl.store(out + at[:, None] * HEAD_DIM + columns[None, :], result, mask=is_row[:, None])

        num_taken += 1
        slot = num_taken % SLOTS
        mbarrier.wait(q_full.index(slot), num_taken // SLOTS & 1)
        kv_head = _get_scalar(scalars, slot * NUM_SCALARS + KV_HEAD)
