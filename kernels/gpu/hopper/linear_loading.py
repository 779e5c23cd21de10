"""The warp that loads for a product: tiles of both operands, from stage to stage of a ring.

Barriers: a stage is full when its bytes have arrived, and empty when all warpgroups have said so.
The warp and the warpgroups walk the same units in the same order and count stages alike. Use `i` of
a stage waits for its `i`th filling, phase `i & 1`; filling `i` for the stage's use `i - 1`, phase
`i & 1 ^ 1`, which a new barrier counts as over. Each filling announces its bytes once and copies
just as many: rows past an end count in full, too. So none waits for what will not come, and nobody
waits for another program.
"""

# Gluon's compiler gives these functions their types, not Python.
# pyright: reportCallIssue=false, reportAssignmentType=false, reportArgumentType=false
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false
# pyright: reportAttributeAccessIssue=false

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma


@gluon.jit
def unit_place(unit, units):
    """A unit's split, tile, the tile's place among tokens and features, and its steps."""
    _, num_tiles, num_token_tiles, num_steps, splits = units
    split = unit // num_tiles
    tile = unit % num_tiles
    # Tiles of the same weights side by side: the second finds them in the L2 cache.
    token_tile = tile % num_token_tiles
    feature_tile = tile // num_token_tiles
    return (
        split,
        tile,
        token_tile,
        feature_tile,
        split * num_steps // splits,
        (split + 1) * num_steps // splits,
    )


@gluon.jit
def wait_for_predecessor(PDL: gl.constexpr):
    if PDL:
        tl.extra.cuda.gdc_wait()


@gluon.jit
def _fill(
    row_desc,
    column_desc,
    row,
    column,
    at,
    buffers,
    full,
    stage,
    rows_due,
    columns_due,
    ROWS: gl.constexpr,
    WARPGROUPS: gl.constexpr,
):
    row_tiles, column_tiles = buffers
    for group in gl.static_range(WARPGROUPS):
        tma.async_copy_global_to_shared(
            row_desc,
            [row + group * ROWS, at],
            full,
            row_tiles.index(stage * WARPGROUPS + group),
            pred=rows_due,
        )
    tma.async_copy_global_to_shared(
        column_desc, [column, at], full, column_tiles.index(stage), pred=columns_due
    )


@gluon.jit
def load(
    row_desc,
    column_desc,
    buffers,
    barriers,
    units,
    TOKENS_ARE_ROWS: gl.constexpr,
    ROWS: gl.constexpr,
    COLUMNS: gl.constexpr,
    INNER: gl.constexpr,
    ELEMENT_BYTES: gl.constexpr,
    WARPGROUPS: gl.constexpr,
    STAGES: gl.constexpr,
    PDL: gl.constexpr,
) -> None:
    full, empty = barriers
    tile_bytes: gl.constexpr = (WARPGROUPS * ROWS + COLUMNS) * INNER * ELEMENT_BYTES
    unit = gl.program_id(0)
    ahead = 0
    if PDL:
        # Nobody writes weights: the first stages' are on the way while the predecessor ends.
        _, _, _, feature_tile, first, last = unit_place(unit, units)
        ahead = gl.minimum(last - first, STAGES)
        for stage in range(ahead):
            mbarrier.expect(full.index(stage), tile_bytes)
            _fill(
                row_desc, column_desc, feature_tile * WARPGROUPS * ROWS, feature_tile * COLUMNS,
                (first + stage) * INNER, buffers, full.index(stage), stage,
                not TOKENS_ARE_ROWS, TOKENS_ARE_ROWS, ROWS, WARPGROUPS,
            )  # fmt: skip
        wait_for_predecessor(PDL)
        tl.extra.cuda.gdc_launch_dependents()
    count = 0
    while unit < units[0]:
        _, _, token_tile, feature_tile, first, last = unit_place(unit, units)
        if TOKENS_ARE_ROWS:
            row = token_tile * WARPGROUPS * ROWS
            column = feature_tile * COLUMNS
        else:
            row = feature_tile * WARPGROUPS * ROWS
            column = token_tile * COLUMNS
        for step in range(first, last):
            stage = count % STAGES
            mbarrier.wait(empty.index(stage), (count // STAGES & 1) ^ 1)
            is_new = count >= ahead
            mbarrier.expect(full.index(stage), tile_bytes, pred=is_new)
            if TOKENS_ARE_ROWS:
                rows_due = count >= 0
                columns_due = is_new
            else:
                rows_due = is_new
                columns_due = count >= 0
            _fill(
                row_desc, column_desc, row, column, step * INNER, buffers, full.index(stage),
                stage, rows_due, columns_due, ROWS, WARPGROUPS,
            )  # fmt: skip
            count += 1
        unit += gl.num_programs(0)
