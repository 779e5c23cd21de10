"""The warpgroups of a layer's kernel: they quantize rows, multiply, add, normalise and gate.

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

from kernels.gpu.hopper.layer_loading import GROUP, LINE, ROWS, STAGE_ROWS, tiles_of
from kernels.gpu.hopper.layer_meeting import (
    ACTIVATED,
    ATTENDED,
    ATTENTION_ADDED,
    LARGEST,
    MLP_ADDED,
    MLP_INPUT,
    NEXT_INPUT,
    arrive,
    reset,
    wait_for,
)
from kernels.gpu.hopper.linear_loading import wait_for_predecessor

FP8_MAX = gl.constexpr(448.0)
SMALLEST_SCALE = gl.constexpr(1e-12 / 448.0)
_LOG2_E = gl.constexpr(1.4426950408889634)


@gluon.jit
def _store_quantized(values, out, scales, row, size, columns):
    """A row of float32 numbers, 0 past its end, in 8 bits."""
    scale = gl.maximum(gl.max(gl.abs(values), 0) / FP8_MAX, SMALLEST_SCALE)
    quantized = (values * (1.0 / scale)).to(gl.float8e4nv)
    gl.store(out + row * size + columns, quantized, mask=columns < size)
    gl.store(scales + row, scale)


@gluon.jit
def _quantize_row(x, row, size, out, scales, BLOCK: gl.constexpr, WARPS: gl.constexpr):
    layout: gl.constexpr = gl.BlockedLayout([8], [32], [WARPS], [0])
    columns = gl.arange(0, BLOCK, layout=layout)
    values = gl.load(x + row * size + columns, mask=columns < size, other=0.0).to(gl.float32)
    _store_quantized(values, out, scales, row, size, columns)


@gluon.jit
def _normalise_row(x, gain, eps, row, size, out, scales, BLOCK: gl.constexpr, WARPS: gl.constexpr):
    """`gain` is the norm's weight, loaded beforehand."""
    layout: gl.constexpr = gl.BlockedLayout([8], [32], [WARPS], [0])
    columns = gl.arange(0, BLOCK, layout=layout)
    mask = columns < size
    at = x + row * size + columns
    values = gl.load(at, mask=mask, other=0.0, cache_modifier=".cg").to(gl.float32)
    scale = gl.rsqrt(gl.sum(values * values, 0) / size + eps)
    _store_quantized(values * scale * gain, out, scales, row, size, columns)


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
def _multiplied(
    tokens,
    weights,
    barriers,
    counts,
    num_stages,
    COLUMNS: gl.constexpr,
    STAGES: gl.constexpr,
    TOKEN_STAGES: gl.constexpr,
    layout: gl.constexpr,
):
    """[ROWS, COLUMNS]: the sums of a product over `num_stages` stages of weights."""
    full, empty, _, tokens_empty = barriers
    count, step = counts
    pieces: gl.constexpr = STAGE_ROWS // COLUMNS
    groups: gl.constexpr = pieces // GROUP
    sums = gl.zeros([ROWS, COLUMNS], gl.float32, layout=layout)
    for i in range(num_stages):
        stage = (count + i) % STAGES
        mbarrier.wait(full.index(stage), (count + i) // STAGES & 1)
        for group in gl.static_range(groups):
            at = i * groups + group
            _wait_for_tokens(barriers, step + at, TOKEN_STAGES)
            token_stage = (step + at) % TOKEN_STAGES
            for piece in gl.static_range(GROUP):
                sums = warpgroup_mma(
                    _token_tile(tokens, token_stage * GROUP + piece),
                    weights.index(stage * pieces + group * GROUP + piece).permute((1, 0)),
                    sums,
                    is_async=True,
                )
            # The group before is through once this one alone is left.
            sums = warpgroup_mma_wait(GROUP, deps=[sums])
            before = (step + at + TOKEN_STAGES - 1) % TOKEN_STAGES
            mbarrier.arrive(tokens_empty.index(before), count=1, pred=at > 0)
            if group == 0:
                before = (count + i + STAGES - 1) % STAGES
                mbarrier.arrive(empty.index(before), count=1, pred=i > 0)
    sums = warpgroup_mma_wait(0, deps=[sums])
    mbarrier.arrive(empty.index((count + num_stages - 1) % STAGES), count=1)
    last = step + num_stages * groups - 1
    mbarrier.arrive(tokens_empty.index(last % TOKEN_STAGES), count=1)
    return sums


@gluon.jit
def _gates_and_up(
    tokens,
    weights,
    barriers,
    counts,
    num_groups,
    GATES: gl.constexpr,
    STAGES: gl.constexpr,
    TOKEN_STAGES: gl.constexpr,
    layout: gl.constexpr,
):
    full, empty, _, tokens_empty = barriers
    count, step = counts
    pieces: gl.constexpr = STAGE_ROWS // 2 // GATES
    stages: gl.constexpr = GROUP // pieces
    gates = gl.zeros([ROWS, GATES], gl.float32, layout=layout)
    up = gl.zeros([ROWS, GATES], gl.float32, layout=layout)
    for i in range(num_groups):
        _wait_for_tokens(barriers, step + i, TOKEN_STAGES)
        token_stage = (step + i) % TOKEN_STAGES
        for piece in gl.static_range(GROUP):
            at = count + i * stages + piece // pieces
            stage = at % STAGES
            if piece % pieces == 0:
                mbarrier.wait(full.index(stage), at // STAGES & 1)
            tile = _token_tile(tokens, token_stage * GROUP + piece)
            place = (stage * pieces + piece % pieces) * 2
            gates = warpgroup_mma(tile, weights.index(place).permute((1, 0)), gates, is_async=True)
            up = warpgroup_mma(tile, weights.index(place + 1).permute((1, 0)), up, is_async=True)
            # The tile before is through once this one alone is left.
            gates, up = warpgroup_mma_wait(2, deps=[gates, up])
            if piece % pieces == 0:
                before = (at + STAGES - 1) % STAGES
                mbarrier.arrive(empty.index(before), count=1, pred=at > count)
            if piece == 0:
                before = (step + i + TOKEN_STAGES - 1) % TOKEN_STAGES
                mbarrier.arrive(tokens_empty.index(before), count=1, pred=i > 0)
    gates, up = warpgroup_mma_wait(0, deps=[gates, up])
    mbarrier.arrive(empty.index((count + num_groups * stages - 1) % STAGES), count=1)
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
    WARPS: gl.constexpr,
):
    layout: gl.constexpr = gl.NVMMADistributedLayout(
        [3, 0], [4, WARPS // 4], [16, CHANNELS // (WARPS // 4), 32]
    )
    count, step = counts
    num_stages = in_features // (STAGE_ROWS // CHANNELS * LINE)
    first = gl.program_id(0) * CHANNELS
    rows = gl.arange(0, ROWS, layout=gl.SliceLayout(1, layout))
    columns = first + gl.arange(0, CHANNELS, layout=gl.SliceLayout(0, layout))
    at = stream + rows[:, None] * out_features + columns[None, :]
    mask = (rows < num_tokens)[:, None]
    channel_scales = _channel_scales(weight_scales, first, CHANNELS, layout)
    added = gl.load(at, mask=mask, other=0.0, cache_modifier=".cg")
    _wait_for_tokens(barriers, step, TOKEN_STAGES)
    scales = _token_scales(token_scales, num_tokens, layout)
    sums = _multiplied(
        tokens, weights, barriers, counts, num_stages, CHANNELS, STAGES, TOKEN_STAGES, layout
    )
    sums = sums * scales[:, None] * channel_scales[None, :] + added.to(gl.float32)
    gl.store(at, sums.to(stream.dtype.element_ty), mask=mask)
    return count + num_stages, step + num_stages * (STAGE_ROWS // CHANNELS // GROUP)


@gluon.jit
def _activate(
    gates,
    up,
    largest,
    counters,
    activated,
    activated_scales,
    num_tokens,
    num_programs,
    intermediate_size,
    GATES: gl.constexpr,
    layout: gl.constexpr,
):
    """silu(gates) * up of a program's channels, by the scale of the token's whole row."""
    program = gl.program_id(0)
    tokens = gl.arange(0, ROWS, layout=gl.SliceLayout(1, layout))
    columns = program * GATES + gl.arange(0, GATES, layout=gl.SliceLayout(0, layout))
    is_token = tokens < num_tokens
    values = gates / (1.0 + gl.exp2(-_LOG2_E * gates)) * up
    values = gl.where(is_token[:, None], values, 0.0)
    # Numbers that aren't negative have the order of their bits.
    highest = gl.max(gl.abs(values), 1).to(gl.int32, bitcast=True)
    gl.atomic_max(largest + tokens, highest, mask=is_token, sem="relaxed")
    arrive(counters, LARGEST)
    wait_for(counters, LARGEST, num_programs)
    bits = gl.load(largest + tokens, mask=is_token, other=0, cache_modifier=".cg")
    scale = gl.maximum(bits.to(gl.float32, bitcast=True) / FP8_MAX, SMALLEST_SCALE)
    quantized = (values * (1.0 / scale)[:, None]).to(gl.float8e4nv)
    at = activated + tokens[:, None] * intermediate_size + columns[None, :]
    gl.store(at, quantized, mask=is_token[:, None])
    if program == 0:
        gl.store(activated_scales + tokens, scale, mask=is_token)
    arrive(counters, ACTIVATED)


@gluon.jit
def multiply_layer(
    tensors,
    buffers,
    barriers,
    counters,
    sizes,
    BLOCK: gl.constexpr,
    NARROW: gl.constexpr,
    GATES: gl.constexpr,
    QKV: gl.constexpr,
    STAGES: gl.constexpr,
    TOKEN_STAGES: gl.constexpr,
    WARPS: gl.constexpr,
    HAS_NEXT: gl.constexpr,
    PDL: gl.constexpr,
):
    attended, stream, norms, quantized, weight_scales, largest, out = tensors
    attended_rows, attended_scales, rows, scales, activated, activated_scales = quantized
    output_scales, gates_scales, down_scales, next_scales = weight_scales
    mlp_norm, next_norm = norms
    tokens, tiles = buffers
    num_tokens, attended_size, hidden_size, intermediate_size, next_size, eps = sizes
    groups: gl.constexpr = WARPS // 4
    row_layout: gl.constexpr = gl.BlockedLayout([8], [32], [WARPS], [0])
    gate_layout: gl.constexpr = gl.NVMMADistributedLayout(
        [3, 0], [4, groups], [16, GATES // groups, 32]
    )
    qkv_layout: gl.constexpr = gl.NVMMADistributedLayout(
        [3, 0], [4, groups], [16, QKV // groups, 32]
    )
    narrow = tiles_of(tiles, NARROW, STAGES)
    program = gl.program_id(0)
    num_narrow = hidden_size // NARROW
    num_gates = intermediate_size // GATES
    columns = gl.arange(0, BLOCK, layout=row_layout)
    is_column = columns < hidden_size
    mlp_gain = gl.load(mlp_norm + columns, mask=is_column, other=0.0).to(gl.float32)
    next_gain = mlp_gain
    wait_for_predecessor(PDL)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    if program < num_tokens:
        _quantize_row(
            attended, program, attended_size, attended_rows, attended_scales, BLOCK, WARPS
        )
        arrive(counters, ATTENDED)
    count = program * 0
    step = program * 0
    if program < num_narrow:
        count, step = _add_product(
            tokens, narrow, barriers, (count, step), attended_scales, output_scales, stream,
            num_tokens, attended_size, hidden_size, NARROW, STAGES, TOKEN_STAGES, WARPS,
        )  # fmt: skip
        arrive(counters, ATTENTION_ADDED)
    if program < num_tokens:
        wait_for(counters, ATTENTION_ADDED, num_narrow)
        if program == 0:
            # Of the kernel before: all of its programs are gone.
            reset(counters, MLP_ADDED)
            reset(counters, NEXT_INPUT)
            gl.store(largest + gl.arange(0, ROWS, layout=gl.SliceLayout(1, gate_layout)), 0)
        _normalise_row(stream, mlp_gain, eps, program, hidden_size, rows, scales, BLOCK, WARPS)
        arrive(counters, MLP_INPUT)
    if program < num_gates:
        num_groups = hidden_size // (GROUP * LINE)
        first = program * GATES
        gate_scales = _channel_scales(gates_scales, first, GATES, gate_layout)
        up_scales = _channel_scales(gates_scales, intermediate_size + first, GATES, gate_layout)
        _wait_for_tokens(barriers, step, TOKEN_STAGES)
        row_scales = _token_scales(scales, num_tokens, gate_layout)[:, None]
        gates, up = _gates_and_up(
            tokens, tiles_of(tiles, GATES, STAGES), barriers, (count, step), num_groups, GATES,
            STAGES, TOKEN_STAGES, gate_layout,
        )  # fmt: skip
        count += num_groups * (GROUP // (STAGE_ROWS // 2 // GATES))
        step += num_groups
        gates *= row_scales * gate_scales[None, :]
        up *= row_scales * up_scales[None, :]
        _activate(
            gates, up, largest, counters, activated, activated_scales, num_tokens, num_gates,
            intermediate_size, GATES, gate_layout,
        )  # fmt: skip
    if HAS_NEXT:
        next_gain = gl.load(next_norm + columns, mask=is_column, other=0.0).to(gl.float32)
    if program < num_narrow:
        count, step = _add_product(
            tokens, narrow, barriers, (count, step), activated_scales, down_scales, stream,
            num_tokens, intermediate_size, hidden_size, NARROW, STAGES, TOKEN_STAGES, WARPS,
        )  # fmt: skip
        arrive(counters, MLP_ADDED)
    if program == 0:
        wait_for(counters, MLP_ADDED, num_narrow)
        # Who waited for these has arrived since.
        reset(counters, ATTENDED)
        reset(counters, ATTENTION_ADDED)
        reset(counters, MLP_INPUT)
        reset(counters, LARGEST)
        reset(counters, ACTIVATED)
    if HAS_NEXT:
        if program < num_tokens:
            wait_for(counters, MLP_ADDED, num_narrow)
            _normalise_row(stream, next_gain, eps, program, hidden_size, rows, scales, BLOCK, WARPS)
            arrive(counters, NEXT_INPUT)
        if program * QKV < next_size:
            num_stages = hidden_size // (STAGE_ROWS // QKV * LINE)
            at_rows = gl.arange(0, ROWS, layout=gl.SliceLayout(1, qkv_layout))
            at_columns = program * QKV + gl.arange(0, QKV, layout=gl.SliceLayout(0, qkv_layout))
            channel_scales = _channel_scales(next_scales, program * QKV, QKV, qkv_layout)
            _wait_for_tokens(barriers, step, TOKEN_STAGES)
            row_scales = _token_scales(scales, num_tokens, qkv_layout)
            sums = _multiplied(
                tokens, tiles_of(tiles, QKV, STAGES), barriers, (count, step), num_stages, QKV,
                STAGES, TOKEN_STAGES, qkv_layout,
            )  # fmt: skip
            sums = sums * row_scales[:, None] * channel_scales[None, :]
            at = out + at_rows[:, None] * next_size + at_columns[None, :]
            mask = (at_rows < num_tokens)[:, None]
            gl.store(at, sums.to(out.dtype.element_ty), mask=mask)
