"""The warpgroup of a layer's kernel: it multiplies, and works on rows in between.

A program has some output channels of each product to itself, over the whole sum: nobody adds parts
up. A token's row is quantized, or normalised first, by one program.
"""

# Gluon's compiler gives these functions their types, not Python.
# pyright: reportCallIssue=false, reportAttributeAccessIssue=false, reportArgumentType=false
# pyright: reportAssignmentType=false
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from kernels.gpu.hopper.layer_loading import GATES, GROUP, LINE, ROWS, STAGE_ROWS, tiles_of
from kernels.gpu.hopper.layer_meeting import (
    ACTIVATED,
    ATTENDED,
    ATTENTION_ADDED,
    MLP_ADDED,
    MLP_INPUT,
    NEXT_INPUT,
    arrive,
    reset,
    wait_for,
)
from kernels.gpu.hopper.layer_rows import WARPS, activate, normalise_row, quantize_row
from kernels.gpu.hopper.linear_loading import wait_for_predecessor


@gluon.jit
def _token_tile(tokens, i):
    """Of `ROWS` rows, the tile's and those of the next ones, which make rows of no meaning."""
    return tokens.index(i)._reinterpret(  # noqa: SLF001
        tokens.dtype, [ROWS, LINE], tokens.layout
    )


@gluon.jit
def _wait_for_tokens(barriers, step, TOKEN_STAGES: gl.constexpr):
    mbarrier.wait(barriers[2].index(step % TOKEN_STAGES), step // TOKEN_STAGES & 1)


@gluon.jit
def _started(
    tokens,
    weights,
    barriers,
    counts,
    i,
    piece: gl.constexpr,
    sums,
    CHANNELS: gl.constexpr,
    STAGES: gl.constexpr,
    TOKEN_STAGES: gl.constexpr,
    USE_SUMS: gl.constexpr,
):
    """A product of the `i`th group's tiles, under way: added to `sums`, or in their place."""
    pieces: gl.constexpr = STAGE_ROWS // CHANNELS
    count, step = counts
    at = count + i * (GROUP // pieces) + piece // pieces
    if piece % pieces == 0:
        mbarrier.wait(barriers[0].index(at % STAGES), at // STAGES & 1)
    return warpgroup_mma(
        _token_tile(tokens, (step + i) % TOKEN_STAGES * GROUP + piece),
        weights.index(at % STAGES * pieces + piece % pieces).permute((1, 0)),
        sums,
        use_acc=USE_SUMS,
        is_async=True,
    )


@gluon.jit
def _release_group(
    barriers,
    counts,
    i,
    CHANNELS: gl.constexpr,
    STAGES: gl.constexpr,
    TOKEN_STAGES: gl.constexpr,
):
    count, step = counts
    stages: gl.constexpr = GROUP // (STAGE_ROWS // CHANNELS)
    for stage in gl.static_range(stages):
        mbarrier.arrive(barriers[1].index((count + i * stages + stage) % STAGES), count=1)
    mbarrier.arrive(barriers[3].index((step + i) % TOKEN_STAGES), count=1)


@gluon.jit
def _multiplied(
    tokens,
    weights,
    barriers,
    counts,
    num_groups,
    CHANNELS: gl.constexpr,
    STAGES: gl.constexpr,
    TOKEN_STAGES: gl.constexpr,
    layout: gl.constexpr,
):
    """[ROWS, CHANNELS]: the sums of a product over `num_groups` stages of tokens."""
    sums = gl.zeros([ROWS, CHANNELS], gl.float32, layout=layout)
    for i in range(num_groups):
        _wait_for_tokens(barriers, counts[1] + i, TOKEN_STAGES)
        for piece in gl.static_range(GROUP):
            sums = _started(
                tokens, weights, barriers, counts, i, piece, sums, CHANNELS, STAGES, TOKEN_STAGES,
                USE_SUMS=True,
            )  # fmt: skip
        sums = warpgroup_mma_wait(0, deps=[sums])
        _release_group(barriers, counts, i, CHANNELS, STAGES, TOKEN_STAGES)
    return sums


@gluon.jit
def _group_scales(scales, i, num_groups, num_tokens, layout: gl.constexpr):
    """Of a group's blocks: four vectors, zeros behind the last group."""
    rows = gl.arange(0, ROWS, layout=gl.SliceLayout(1, layout))
    mask = (rows < num_tokens) & (i < num_groups)
    at = scales + i * (GROUP * ROWS) + rows
    first = gl.load(at, mask=mask, other=0.0, cache_modifier=".cg")
    second = gl.load(at + ROWS, mask=mask, other=0.0, cache_modifier=".cg")
    third = gl.load(at + 2 * ROWS, mask=mask, other=0.0, cache_modifier=".cg")
    fourth = gl.load(at + 3 * ROWS, mask=mask, other=0.0, cache_modifier=".cg")
    return first, second, third, fourth


@gluon.jit
def _multiplied_by_blocks(
    tokens,
    weights,
    barriers,
    counts,
    num_groups,
    scales,
    num_tokens,
    CHANNELS: gl.constexpr,
    STAGES: gl.constexpr,
    TOKEN_STAGES: gl.constexpr,
    layout: gl.constexpr,
):
    """`_multiplied` for tokens that have a scale for each tile, [tiles, ROWS], which count."""
    sums = gl.zeros([ROWS, CHANNELS], gl.float32, layout=layout)
    nothing = gl.zeros([ROWS, CHANNELS], gl.float32, layout=layout)
    now = _group_scales(scales, 0, num_groups, num_tokens, layout)
    soon = _group_scales(scales, 1, num_groups, num_tokens, layout)
    for i in range(num_groups):
        # Two groups ahead: they come from the L2 cache, behind weights.
        later = _group_scales(scales, i + 2, num_groups, num_tokens, layout)
        _wait_for_tokens(barriers, counts[1] + i, TOKEN_STAGES)
        first = _started(
            tokens, weights, barriers, counts, i, 0, nothing, CHANNELS, STAGES, TOKEN_STAGES,
            USE_SUMS=False,
        )  # fmt: skip
        second = _started(
            tokens, weights, barriers, counts, i, 1, nothing, CHANNELS, STAGES, TOKEN_STAGES,
            USE_SUMS=False,
        )  # fmt: skip
        third = _started(
            tokens, weights, barriers, counts, i, 2, nothing, CHANNELS, STAGES, TOKEN_STAGES,
            USE_SUMS=False,
        )  # fmt: skip
        fourth = _started(
            tokens, weights, barriers, counts, i, 3, nothing, CHANNELS, STAGES, TOKEN_STAGES,
            USE_SUMS=False,
        )  # fmt: skip
        sums += warpgroup_mma_wait(3, deps=[first]) * now[0][:, None]
        sums += warpgroup_mma_wait(2, deps=[second]) * now[1][:, None]
        sums += warpgroup_mma_wait(1, deps=[third]) * now[2][:, None]
        sums += warpgroup_mma_wait(0, deps=[fourth]) * now[3][:, None]
        _release_group(barriers, counts, i, CHANNELS, STAGES, TOKEN_STAGES)
        now = soon
        soon = later
    return sums


@gluon.jit
def _gates_and_up(
    tokens,
    weights,
    barriers,
    counts,
    num_groups,
    STAGES: gl.constexpr,
    TOKEN_STAGES: gl.constexpr,
    layout: gl.constexpr,
):
    """[ROWS, GATES], twice. Tiles of gates and of what they are for take turns."""
    full, empty, _, tokens_empty = barriers
    count, step = counts
    gates = gl.zeros([ROWS, GATES], gl.float32, layout=layout)
    up = gl.zeros([ROWS, GATES], gl.float32, layout=layout)
    for i in range(num_groups):
        _wait_for_tokens(barriers, step + i, TOKEN_STAGES)
        token_stage = (step + i) % TOKEN_STAGES
        for piece in gl.static_range(GROUP):
            tile = _token_tile(tokens, token_stage * GROUP + piece)
            at = count + (i * GROUP + piece) * 2
            mbarrier.wait(full.index(at % STAGES), at // STAGES & 1)
            gate_channels = weights.index(at % STAGES).permute((1, 0))
            gates = warpgroup_mma(tile, gate_channels, gates, is_async=True)
            mbarrier.wait(full.index((at + 1) % STAGES), (at + 1) // STAGES & 1)
            up_channels = weights.index((at + 1) % STAGES).permute((1, 0))
            up = warpgroup_mma(tile, up_channels, up, is_async=True)
            # The pair before is through once this one alone is left.
            gates, up = warpgroup_mma_wait(2, deps=[gates, up])
            is_second = i * GROUP + piece > 0
            mbarrier.arrive(empty.index((at + STAGES - 2) % STAGES), count=1, pred=is_second)
            mbarrier.arrive(empty.index((at + STAGES - 1) % STAGES), count=1, pred=is_second)
            if piece == 0:
                before = (step + i + TOKEN_STAGES - 1) % TOKEN_STAGES
                mbarrier.arrive(tokens_empty.index(before), count=1, pred=i > 0)
    gates, up = warpgroup_mma_wait(0, deps=[gates, up])
    last = count + num_groups * GROUP * 2 - 1
    mbarrier.arrive(empty.index((last - 1) % STAGES), count=1)
    mbarrier.arrive(empty.index(last % STAGES), count=1)
    mbarrier.arrive(tokens_empty.index((step + num_groups - 1) % TOKEN_STAGES), count=1)
    return gates, up


@gluon.jit
def _token_scales(scales, num_tokens, layout: gl.constexpr):
    tokens = gl.arange(0, ROWS, layout=gl.SliceLayout(1, layout))
    return gl.load(scales + tokens, mask=tokens < num_tokens, other=0.0, cache_modifier=".cg")


@gluon.jit
def _channel_scales(scales, first, COLUMNS: gl.constexpr, layout: gl.constexpr):
    """Loaded long before they are needed: the memory is busy with weights."""
    return gl.load(scales + first + gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, layout)))


@gluon.jit
def _add_product(
    tokens,
    weights,
    barriers,
    counts,
    token_scales,
    weight_scales,
    stream,
    num_tokens,
    in_features,
    out_features,
    CHANNELS: gl.constexpr,
    STAGES: gl.constexpr,
    TOKEN_STAGES: gl.constexpr,
    IN_BLOCKS: gl.constexpr,
):
    """To the residual stream. `token_scales` are of whole rows, or of blocks."""
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, CHANNELS, 32])
    count, step = counts
    num_groups = in_features // (GROUP * LINE)
    first = gl.program_id(0) * CHANNELS
    rows = gl.arange(0, ROWS, layout=gl.SliceLayout(1, layout))
    columns = first + gl.arange(0, CHANNELS, layout=gl.SliceLayout(0, layout))
    at = stream + rows[:, None] * out_features + columns[None, :]
    mask = (rows < num_tokens)[:, None]
    channel_scales = _channel_scales(weight_scales, first, CHANNELS, layout)
    added = gl.load(at, mask=mask, other=0.0, cache_modifier=".cg")
    _wait_for_tokens(barriers, step, TOKEN_STAGES)
    if IN_BLOCKS:
        sums = _multiplied_by_blocks(
            tokens, weights, barriers, counts, num_groups, token_scales, num_tokens, CHANNELS,
            STAGES, TOKEN_STAGES, layout,
        )  # fmt: skip
    else:
        scales = _token_scales(token_scales, num_tokens, layout)
        sums = _multiplied(
            tokens, weights, barriers, counts, num_groups, CHANNELS, STAGES, TOKEN_STAGES, layout
        )
        sums *= scales[:, None]
    sums = sums * channel_scales[None, :] + added.to(gl.float32)
    gl.store(at, sums.to(stream.dtype.element_ty), mask=mask)
    return count + num_groups * GROUP // (STAGE_ROWS // CHANNELS), step + num_groups


@gluon.jit
def multiply_layer(
    tensors,
    buffers,
    barriers,
    counters,
    sizes,
    BLOCK: gl.constexpr,
    NARROW: gl.constexpr,
    QKV: gl.constexpr,
    STAGES: gl.constexpr,
    TOKEN_STAGES: gl.constexpr,
    HAS_NEXT: gl.constexpr,
    PDL: gl.constexpr,
):
    attended, stream, norms, quantized, weight_scales, out = tensors
    attended_rows, attended_scales, rows, scales, activated, activated_scales = quantized
    output_scales, gates_scales, down_scales, next_scales = weight_scales
    mlp_norm, next_norm = norms
    tokens, tiles = buffers
    num_tokens, attended_size, hidden_size, intermediate_size, next_size, eps = sizes
    row_layout: gl.constexpr = gl.BlockedLayout([8], [32], [WARPS], [0])
    gate_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, GATES, 32])
    qkv_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, QKV, 32])
    narrow = tiles_of(tiles, NARROW, STAGES)
    program = gl.program_id(0)
    num_narrow = hidden_size // NARROW
    num_gates = intermediate_size // GATES
    columns = gl.arange(0, BLOCK, layout=row_layout)
    is_column = columns < hidden_size
    mlp_gain = gl.load(mlp_norm + columns, mask=is_column, other=0.0).to(gl.float32)
    wait_for_predecessor(PDL)
    if program < num_tokens:
        quantize_row(attended, program, attended_size, attended_rows, attended_scales, BLOCK)
        arrive(counters, ATTENDED, IS_COPIED=True)
    count = program * 0
    step = program * 0
    if program < num_narrow:
        count, step = _add_product(
            tokens, narrow, barriers, (count, step), attended_scales, output_scales, stream,
            num_tokens, attended_size, hidden_size, NARROW, STAGES, TOKEN_STAGES,
            IN_BLOCKS=False,
        )  # fmt: skip
        arrive(counters, ATTENTION_ADDED, IS_COPIED=False)
    if program < num_tokens:
        wait_for(counters, ATTENTION_ADDED, num_narrow, COPIES=False)
        if program == 0:
            # Of the kernel before: all of its programs are gone.
            reset(counters, MLP_ADDED)
            reset(counters, NEXT_INPUT)
        normalise_row(stream, mlp_gain, eps, program, hidden_size, rows, scales, BLOCK)
        arrive(counters, MLP_INPUT, IS_COPIED=True)
    num_groups = hidden_size // (GROUP * LINE)
    if program < num_gates:
        first = program * GATES
        gate_scales = _channel_scales(gates_scales, first, GATES, gate_layout)
        up_scales = _channel_scales(gates_scales, intermediate_size + first, GATES, gate_layout)
        _wait_for_tokens(barriers, step, TOKEN_STAGES)
        row_scales = _token_scales(scales, num_tokens, gate_layout)[:, None]
        gates, up = _gates_and_up(
            tokens, tiles, barriers, (count, step), num_groups, STAGES, TOKEN_STAGES, gate_layout,
        )  # fmt: skip
        count += num_groups * GROUP * 2
        step += num_groups
        gates *= row_scales * gate_scales[None, :]
        up *= row_scales * up_scales[None, :]
        activate(
            gates, up, activated, activated_scales, num_tokens, intermediate_size,
            gate_layout,
        )  # fmt: skip
        arrive(counters, ACTIVATED, IS_COPIED=True)
    next_gain = mlp_gain
    if HAS_NEXT:
        next_gain = gl.load(next_norm + columns, mask=is_column, other=0.0).to(gl.float32)
    if program < num_narrow:
        count, step = _add_product(
            tokens, narrow, barriers, (count, step), activated_scales, down_scales, stream,
            num_tokens, intermediate_size, hidden_size, NARROW, STAGES, TOKEN_STAGES,
            IN_BLOCKS=True,
        )  # fmt: skip
        arrive(counters, MLP_ADDED, IS_COPIED=False)
    if PDL:
        # Not before: what the successor asks for ahead would be gone from the L2 cache.
        tl.extra.cuda.gdc_launch_dependents()
    if program == 0:
        wait_for(counters, MLP_ADDED, num_narrow, COPIES=False)
        # Who waited for these has arrived since.
        reset(counters, ATTENDED)
        reset(counters, ATTENTION_ADDED)
        reset(counters, MLP_INPUT)
        reset(counters, ACTIVATED)
    if HAS_NEXT:
        if program < num_tokens:
            wait_for(counters, MLP_ADDED, num_narrow, COPIES=False)
            normalise_row(stream, next_gain, eps, program, hidden_size, rows, scales, BLOCK)
            arrive(counters, NEXT_INPUT, IS_COPIED=True)
        if program * QKV < next_size:
            at_rows = gl.arange(0, ROWS, layout=gl.SliceLayout(1, qkv_layout))
            at_columns = program * QKV + gl.arange(0, QKV, layout=gl.SliceLayout(0, qkv_layout))
            channel_scales = _channel_scales(next_scales, program * QKV, QKV, qkv_layout)
            _wait_for_tokens(barriers, step, TOKEN_STAGES)
            row_scales = _token_scales(scales, num_tokens, qkv_layout)
            sums = _multiplied(
                tokens, tiles_of(tiles, QKV, STAGES), barriers, (count, step), num_groups, QKV,
                STAGES, TOKEN_STAGES, qkv_layout,
            )  # fmt: skip
            sums = sums * row_scales[:, None] * channel_scales[None, :]
            at = out + at_rows[:, None] * next_size + at_columns[None, :]
            mask = (at_rows < num_tokens)[:, None]
            gl.store(at, sums.to(out.dtype.element_ty), mask=mask)
