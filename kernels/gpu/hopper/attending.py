"""A warpgroup that attends, for half of the rows of each tile.

The softmax of a tile of tokens runs while the matrix units work on the weighted sum of the tile
before it and, for the other warpgroup, on scores. Tokens are walked backwards: only the first one
or two tiles have some that a row must not see.
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
    FIRST_POSITION,
    FIRST_TOKEN,
    KV_HEAD,
    KV_LEN,
    NUM_LEFT,
    NUM_SCALARS,
    ROWS,
    line_elements,
)

# Below every score; not infinite, so that a row which has seen nothing yet needs no case, and a
# power of two, so that its product with the scale is the same rounded or fused.
UNSEEN = gl.constexpr(-(2.0**100))
# Weights of 8 bits are 2 to this times as large, up to 256, so that small ones keep their digits.
WEIGHT_SHIFT = gl.constexpr(8)


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
    LINE: gl.constexpr,
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


@gluon.jit
def _mask(scores, first, positions, TOKENS: gl.constexpr, layout: gl.constexpr):
    tokens = first + gl.arange(0, TOKENS, layout=gl.SliceLayout(0, layout))
    return gl.where(positions[:, None] >= tokens[None, :], scores, UNSEEN)


@gluon.jit
def _softmax(scores, highest, total, scale, SHIFT: gl.constexpr):
    """Weights of a tile, the new maxima and totals, and how far earlier sums fade."""
    new_highest = gl.maximum(highest, gl.max(scores, 1))
    subtracted = new_highest * scale
    faded = gl.exp2(highest * scale - subtracted)
    weights = gl.exp2(scores * scale[:, None] - (subtracted - SHIFT)[:, None])
    return weights, new_highest, total * faded + gl.sum(weights, 1), faded


@gluon.jit
def _as_operand(weights, dtype: gl.constexpr, TOKENS: gl.constexpr, operand: gl.constexpr):
    """Weights as the matrix instruction takes them. Of 8 bits, a thread keeps what it has, in the
    order of `kernels.gpu.fp8_operands.turned_order`."""
    weights = weights.to(dtype)
    if dtype.primitive_bitwidth == 8:
        pairs = weights.reshape([ROWS, TOKENS // 16, 2, 4, 2])
        weights = pairs.permute([0, 1, 3, 2, 4]).reshape([ROWS, TOKENS])
        return gl.convert_layout(weights, operand, assert_trivial=True)
    return gl.convert_layout(weights, operand)


@gluon.jit
def _start_scores(queries, at, keys, full, count, TOKENS: gl.constexpr, STAGES: gl.constexpr,
                  PARTS: gl.constexpr, layout: gl.constexpr):  # fmt: skip
    stage = count % STAGES
    mbarrier.wait(full.index(stage), count // STAGES & 1)
    scores = warpgroup_mma_init(gl.zeros([ROWS, TOKENS], gl.float32, layout=layout))
    key = keys.index(stage).permute((1, 0))
    for part in gl.static_range(PARTS):
        query = queries.index(at + part)
        scores = warpgroup_mma(query, key, scores, use_acc=part > 0, is_async=True)
    return scores


@gluon.jit
def _start_sums(weights, values, stage, sums, IS_8_BIT: gl.constexpr, layout: gl.constexpr):
    if IS_8_BIT:
        zeros = warpgroup_mma_init(gl.zeros(sums.shape, gl.float32, layout=layout))
        turned = values.index(stage).permute((1, 0))
        product = warpgroup_mma(weights, turned, zeros, use_acc=False, is_async=True)
    else:
        product = warpgroup_mma(weights, values.index(stage), sums, is_async=True)
    return product


@gluon.jit
def _step(
    queries,
    query_at,
    keys,
    values,
    barriers,
    weights,
    sums,
    faded,
    highest,
    total,
    count,
    first,
    positions,
    scale,
    TOKENS: gl.constexpr,
    STAGES: gl.constexpr,
    PARTS: gl.constexpr,
    layout: gl.constexpr,
    operand: gl.constexpr,
    IS_MASKED: gl.constexpr,
):
    """Scores and weights of tile `count`, and the weighted sum of the tile before it.

    Sums of 16-bit weights have faded already. For those of 8 the matrix units sum one tile with few
    digits, which is added to the sums of all here; they have yet to fade by `faded`.
    """
    k_full, k_empty, v_full, v_empty = barriers
    before = (count - 1) % STAGES
    scores = _start_scores(queries, query_at, keys, k_full, count, TOKENS, STAGES, PARTS, layout)
    mbarrier.wait(v_full.index(before), (count - 1) // STAGES & 1)
    is_8_bit: gl.constexpr = keys.dtype.primitive_bitwidth == 8
    sum_layout: gl.constexpr = operand.parent
    product = _start_sums(weights, values, before, sums, is_8_bit, sum_layout)
    scores = warpgroup_mma_wait(1, deps=[scores])
    mbarrier.arrive(k_empty.index(count % STAGES), count=1)
    if IS_MASKED:
        scores = _mask(scores, first, positions, TOKENS, layout)
    shift: gl.constexpr = WEIGHT_SHIFT if is_8_bit else 0
    new_weights, highest, total, new_faded = _softmax(scores, highest, total, scale, shift)
    product = warpgroup_mma_wait(0, deps=[product])
    mbarrier.arrive(v_empty.index(before), count=1)
    new_faded = gl.convert_layout(new_faded, gl.SliceLayout(1, sum_layout))
    sums = sums * faded[:, None] + product if is_8_bit else product * new_faded[:, None]
    weights = _as_operand(new_weights, keys.dtype, TOKENS, operand)
    return weights, sums, new_faded, highest, total


@gluon.jit
def attend(
    half: gl.constexpr,
    out,
    q_scales,
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
    PARTS: gl.constexpr,
) -> None:
    scalars, query_boxes, key_boxes, value_boxes = buffers
    q_full, q_empty, k_full, k_empty, v_full, v_empty = barriers
    dtype: gl.constexpr = key_boxes.dtype
    bits: gl.constexpr = dtype.primitive_bitwidth
    is_8_bit: gl.constexpr = bits == 8
    shift: gl.constexpr = WEIGHT_SHIFT if is_8_bit else 0
    inner: gl.constexpr = 256 // bits
    line: gl.constexpr = line_elements(HEAD_DIM, bits)
    swizzled: gl.constexpr = gl.NVMMASharedLayout(line * bits // 8, bits, 2)
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TOKENS, inner])
    sum_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_DIM, inner])
    operand: gl.constexpr = gl.DotOperandLayout(0, sum_layout, 32 // bits)
    row_layout: gl.constexpr = gl.SliceLayout(1, layout)
    store_layout: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0])
    queries = query_boxes._reinterpret(dtype, [SLOTS * 2 * PARTS, ROWS, HEAD_DIM], swizzled)
    keys = key_boxes._reinterpret(dtype, [STAGES, TOKENS, HEAD_DIM], swizzled)
    if is_8_bit:
        values = value_boxes
    else:
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
        query_at = (slot * 2 + half) * PARTS
        positions = first_position + my_queries
        row_scale = gl.full([ROWS], scale, gl.float32, layout=row_layout)
        if is_8_bit:
            row_head = gl.arange(0, ROWS, layout=row_layout) % PADDED_GROUP
            at = (first_token + my_queries).to(gl.int64) * num_heads + kv_head * GROUP + row_head
            is_query = (my_queries < num_left) & (row_head < GROUP)
            row_scale *= gl.load(q_scales + at, mask=is_query, other=0.0)
        end = gl.minimum(first_position + QUERIES, kv_len)
        num = (end + TOKENS - 1) // TOKENS
        num_clear = gl.minimum((first_position + my_first + 1) // TOKENS, num - 1)
        first = (num - 1) * TOKENS

        scores = _start_scores(
            queries, query_at, keys, k_full, count, TOKENS, STAGES, PARTS, layout
        )
        scores = warpgroup_mma_wait(0, deps=[scores])
        stage = count % STAGES
        mbarrier.arrive(k_empty.index(stage), count=1)
        scores = _mask(scores, first, positions, TOKENS, layout)
        highest = gl.full([ROWS], UNSEEN, gl.float32, layout=row_layout)
        total = gl.zeros([ROWS], gl.float32, layout=row_layout)
        new_weights, highest, total, faded = _softmax(scores, highest, total, row_scale, shift)
        faded = gl.convert_layout(faded, gl.SliceLayout(1, sum_layout))
        weights = _as_operand(new_weights, dtype, TOKENS, operand)
        sums = gl.zeros([ROWS, HEAD_DIM], gl.float32, layout=sum_layout)
        ends_within = (kv_len < first + TOKENS) & (kv_len % BOX != 0)
        if not is_8_bit and ends_within:
            mbarrier.wait(v_full.index(stage), count // STAGES & 1)
            _zero_past_end(value_boxes, stage, first, kv_len, BOX, TOKENS, line, HEAD_DIM // line)
        count += 1
        for i in range(1, num - num_clear):
            weights, sums, faded, highest, total = _step(
                queries, query_at, keys, values, kv_barriers, weights, sums, faded, highest, total,
                count, first - i * TOKENS, positions, row_scale, TOKENS, STAGES, PARTS, layout,
                operand, IS_MASKED=True,
            )  # fmt: skip
            count += 1
        for _ in range(num_clear):
            weights, sums, faded, highest, total = _step(
                queries, query_at, keys, values, kv_barriers, weights, sums, faded, highest, total,
                count, 0, positions, row_scale, TOKENS, STAGES, PARTS, layout, operand,
                IS_MASKED=False,
            )  # fmt: skip
            count += 1
        mbarrier.arrive(q_empty.index(slot), count=1)
        last = (count - 1) % STAGES
        mbarrier.wait(v_full.index(last), (count - 1) // STAGES & 1)
        product = _start_sums(weights, values, last, sums, is_8_bit, sum_layout)
        product = warpgroup_mma_wait(0, deps=[product])
        mbarrier.arrive(v_empty.index(last), count=1)
        sums = sums * faded[:, None] + product if is_8_bit else product

        total = gl.convert_layout(total, gl.SliceLayout(1, sum_layout))
        result = (sums * (v_scale / total)[:, None]).to(out.dtype.element_ty)
        result = gl.convert_layout(result, store_layout)
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
