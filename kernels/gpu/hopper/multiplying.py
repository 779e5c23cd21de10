"""A warpgroup that multiplies: its rows of a tile, over the steps of a unit, to the result.

Where units are parts of a tile's sum (splits), some neighbours' sums are merged, then those of such
groups, and so on. Each leaves its sums and counts itself; the last one of a group adds up what all
of them left, in their order, so results don't vary, and nobody waits.
"""

# Gluon's compiler gives these functions their types, not Python.
# pyright: reportCallIssue=false, reportAssignmentType=false, reportArgumentType=false
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false
# pyright: reportAttributeAccessIssue=false

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from kernels.gpu.hopper.linear_loading import unit_place, wait_for_predecessor

# Splits that a tile's counters are enough for: of pairs, say, there are 8, 4, 2 and 1.
MAX_SPLITS = gl.constexpr(16)
# Sums that a warpgroup finishes at once.
PIECE = gl.constexpr(64 * 128)


@gluon.jit
def _product(
    group: gl.constexpr,
    buffers,
    barriers,
    count,
    num_steps,
    ROWS: gl.constexpr,
    COLUMNS: gl.constexpr,
    WARPGROUPS: gl.constexpr,
    STAGES: gl.constexpr,
    layout: gl.constexpr,
):
    """Summed over `num_steps` steps, at least one, in the tensor cores' accumulators, which are
    short ones for 8-bit numbers."""
    row_tiles, column_tiles = buffers
    full, empty = barriers
    sums = gl.zeros([ROWS, COLUMNS], gl.float32, layout=layout)
    for i in range(num_steps):
        stage = (count + i) % STAGES
        mbarrier.wait(full.index(stage), (count + i) // STAGES & 1)
        sums = warpgroup_mma(
            row_tiles.index(stage * WARPGROUPS + group),
            column_tiles.index(stage).permute((1, 0)),
            sums,
            is_async=True,
        )
        # The step before is through once this one alone is left.
        sums = warpgroup_mma_wait(1, deps=[sums])
        before = (count + i + STAGES - 1) % STAGES
        mbarrier.arrive(empty.index(before), count=1, pred=i > 0)
    sums = warpgroup_mma_wait(0, deps=[sums])
    mbarrier.arrive(empty.index((count + num_steps - 1) % STAGES), count=1)
    return sums


@gluon.jit
def _merge(
    sums,
    partial,
    arrivals,
    split,
    splits,
    merged,
    split_size,
    ROWS: gl.constexpr,
    COLUMNS: gl.constexpr,
    layout: gl.constexpr,
):
    """The sums of all splits, and whether this is the program that has them.

    `partial` and `arrivals` are the tile's; the former has a place for each split.
    """
    rows = gl.arange(0, ROWS, layout=gl.SliceLayout(1, layout))
    columns = gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, layout))
    # What a warp's threads hold of 8 by 8 sums lies side by side.
    squares = (rows // 8 * (COLUMNS // 8))[:, None] + (columns // 8)[None, :]
    places = partial + squares * 64 + (rows % 8 * 8)[:, None] + (columns % 8)[None, :]
    # These are the sums of `span` splits, from a multiple of it on.
    span = 1
    goes_on = splits > 1
    while goes_on & (span < splits):
        mine = split // span * span
        first = split // (span * merged) * (span * merged)
        num = gl.minimum((splits - first + span - 1) // span, merged)
        if num > 1:
            gl.store(places + mine * split_size, sums)
            # Every thread's sums are written before the one that counts says so.
            tl.debug_barrier()
            counter = arrivals + MAX_SPLITS - MAX_SPLITS // span + split // (span * merged)
            goes_on = gl.atomic_add(counter, 1, sem="acq_rel") == num - 1
            if goes_on:
                tl.debug_barrier()
                if num == 2:
                    # Two numbers make the same sum either way.
                    other = 2 * first + span - mine
                    sums += gl.load(places + other * split_size, cache_modifier=".cg")
                else:
                    sums = gl.load(places + first * split_size, cache_modifier=".cg")
                    for i in range(1, num):
                        at = places + (first + i * span) * split_size
                        sums += gl.load(at, cache_modifier=".cg")
                # Zero again for the next kernel: all of the group have been here.
                gl.store(counter, 0)
        span *= merged
    return sums, goes_on | (splits == 1)


@gluon.jit
def _finish_piece(
    sums,
    out,
    scales,
    bias,
    row,
    column,
    num_tokens,
    out_features,
    HAS_SCALES: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    HAS_RESIDUAL: gl.constexpr,
    TOKENS_ARE_ROWS: gl.constexpr,
    ROWS: gl.constexpr,
    COLUMNS: gl.constexpr,
    DEPTH: gl.constexpr,
):
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLUMNS, DEPTH])
    row_scales, column_scales = scales
    rows = row + gl.arange(0, ROWS, layout=gl.SliceLayout(1, layout))
    columns = column + gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, layout))
    # Threads side by side store features side by side.
    if TOKENS_ARE_ROWS:
        num_rows = num_tokens
        num_columns = out_features
        lanes: gl.constexpr = COLUMNS // 8
        stored: gl.constexpr = gl.BlockedLayout([1, 8], [32 // lanes, lanes], [4, 1], [1, 0])
    else:
        num_rows = out_features
        num_columns = num_tokens
        lanes: gl.constexpr = ROWS // 8
        stored: gl.constexpr = gl.BlockedLayout([8, 1], [lanes, 32 // lanes], [1, 4], [0, 1])
    is_row = rows < num_rows
    is_column = columns < num_columns
    if HAS_SCALES:
        sums *= gl.load(row_scales + rows, mask=is_row, other=0.0)[:, None]
        sums *= gl.load(column_scales + columns, mask=is_column, other=0.0)[None, :]
    if HAS_BIAS:
        if TOKENS_ARE_ROWS:
            sums += gl.load(bias + columns, mask=is_column, other=0.0).to(gl.float32)[None, :]
        else:
            sums += gl.load(bias + rows, mask=is_row, other=0.0).to(gl.float32)[:, None]
    stored_rows = row + gl.arange(0, ROWS, layout=gl.SliceLayout(1, stored))
    stored_columns = column + gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, stored))
    mask = (stored_rows < num_rows)[:, None] & (stored_columns < num_columns)[None, :]
    if TOKENS_ARE_ROWS:
        at = stored_rows[:, None] * out_features + stored_columns[None, :]
    else:
        at = stored_columns[None, :] * out_features + stored_rows[:, None]
    if HAS_RESIDUAL:
        added = gl.convert_layout(gl.load(out + at, mask=mask, other=0.0), layout)
        sums += added.to(gl.float32)
    gl.store(out + at, gl.convert_layout(sums.to(out.dtype.element_ty), stored), mask=mask)


@gluon.jit
def _finish(
    sums,
    out,
    scales,
    bias,
    row,
    column,
    num_tokens,
    out_features,
    HAS_SCALES: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    HAS_RESIDUAL: gl.constexpr,
    TOKENS_ARE_ROWS: gl.constexpr,
    ROWS: gl.constexpr,
    COLUMNS: gl.constexpr,
    DEPTH: gl.constexpr,
):
    """Scales, adds bias and residual, rounds once and stores: in pieces, for want of registers."""
    if ROWS * COLUMNS > PIECE:
        half: gl.constexpr = COLUMNS // 2
        layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, half, DEPTH])
        pieces = gl.split(sums.reshape([ROWS, 2, half]).permute([0, 2, 1]))
        for i in gl.static_range(2):
            _finish(
                gl.convert_layout(pieces[i], layout, assert_trivial=True), out, scales, bias, row,
                column + i * half, num_tokens, out_features, HAS_SCALES, HAS_BIAS, HAS_RESIDUAL,
                TOKENS_ARE_ROWS, ROWS, half, DEPTH,
            )  # fmt: skip
    else:
        _finish_piece(
            sums, out, scales, bias, row, column, num_tokens, out_features, HAS_SCALES, HAS_BIAS,
            HAS_RESIDUAL, TOKENS_ARE_ROWS, ROWS, COLUMNS, DEPTH,
        )  # fmt: skip


@gluon.jit
def multiply(
    group: gl.constexpr,
    work,
    TOKENS_ARE_ROWS: gl.constexpr,
    ROWS: gl.constexpr,
    COLUMNS: gl.constexpr,
    ELEMENT_BYTES: gl.constexpr,
    WARPGROUPS: gl.constexpr,
    STAGES: gl.constexpr,
    PROMOTED: gl.constexpr,
    IS_SPLIT: gl.constexpr,
    HAS_SCALES: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    HAS_RESIDUAL: gl.constexpr,
    PDL: gl.constexpr,
) -> None:
    out, scales, bias, parts, buffers, barriers, num_tokens, out_features, units = work
    # A matrix instruction takes 32 bytes of a row.
    depth: gl.constexpr = 32 // ELEMENT_BYTES
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLUMNS, depth])
    size: gl.constexpr = ROWS * COLUMNS
    wait_for_predecessor(PDL)
    unit = gl.program_id(0)
    count = 0
    while unit < units[0]:
        split, tile, token_tile, feature_tile, first, last = unit_place(unit, units)
        if PROMOTED == 0:
            sums = _product(
                group, buffers, barriers, count, last - first, ROWS, COLUMNS, WARPGROUPS, STAGES,
                layout,
            )  # fmt: skip
        else:
            sums = gl.zeros([ROWS, COLUMNS], gl.float32, layout=layout)
            for start in range(first, last, PROMOTED):
                sums += _product(
                    group, buffers, barriers, count + start - first,
                    gl.minimum(last - start, PROMOTED), ROWS, COLUMNS, WARPGROUPS, STAGES, layout,
                )  # fmt: skip
        count += last - first
        is_whole = unit >= 0
        if IS_SPLIT:
            subtile = tile * WARPGROUPS + group
            sums, is_whole = _merge(
                sums, parts[0] + subtile * size, parts[1] + subtile * MAX_SPLITS, split, units[4],
                parts[2], units[1] * WARPGROUPS * size, ROWS, COLUMNS, layout,
            )  # fmt: skip
        if is_whole:
            if TOKENS_ARE_ROWS:
                row = token_tile * WARPGROUPS * ROWS + group * ROWS
                column = feature_tile * COLUMNS
            else:
                row = feature_tile * WARPGROUPS * ROWS + group * ROWS
                column = token_tile * COLUMNS
            _finish(
                sums, out, scales, bias, row, column, num_tokens, out_features, HAS_SCALES,
                HAS_BIAS, HAS_RESIDUAL, TOKENS_ARE_ROWS, ROWS, COLUMNS, depth,
            )  # fmt: skip
        unit += gl.num_programs(0)
