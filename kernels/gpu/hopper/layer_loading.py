"""The two warps that load for a layer's kernel: weights, as far ahead as there is room, and tokens.

Weights depend on nothing, so their warp walks through all four products without a stop, and memory
is busy while programs meet. Tokens' rows come when they are there. Both kinds of tiles have rings
of their own, in which stages are filled and emptied as in `linear_loading`.
"""

# Gluon's compiler gives these functions their types, not Python.
# pyright: reportCallIssue=false, reportAttributeAccessIssue=false, reportArgumentType=false
# pyright: reportGeneralTypeIssues=false

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from kernels.gpu.hopper import layer_shapes
from kernels.gpu.hopper.layer_meeting import (
    ACTIVATED,
    ATTENDED,
    MLP_INPUT,
    NEXT_INPUT,
    wait_for,
)
from kernels.gpu.hopper.linear_loading import wait_for_predecessor

# Bytes of a row in a tile; rows of a tile of tokens as it is multiplied.
LINE = gl.constexpr(layer_shapes.LINE_BYTES)
ROWS = gl.constexpr(layer_shapes.MAX_TOKENS)
# Tiles of tokens of a stage, side by side in their rows; rows of weights that a stage holds.
GROUP = gl.constexpr(layer_shapes.GROUP)
STAGE_ROWS = gl.constexpr(layer_shapes.STAGE_ROWS)
GATES = gl.constexpr(layer_shapes.GATES)


@gluon.jit
def _wait_for_room(barriers, count, STAGES: gl.constexpr, ASKED: gl.constexpr):
    """Until a stage is free, and no more than `ASKED` are on their way with it: what lies in the
    memory's queues holds up those who meet."""
    full, empty = barriers
    mbarrier.wait(empty.index(count % STAGES), (count // STAGES & 1) ^ 1)
    before = gl.maximum(count - ASKED, 0)
    mbarrier.wait(full.index(before % STAGES), before // STAGES & 1, pred=count >= ASKED)


@gluon.jit
def _load_rows(
    desc,
    tiles,
    barriers,
    count,
    out_features,
    in_features,
    CHANNELS: gl.constexpr,
    STAGES: gl.constexpr,
    ASKED: gl.constexpr,
):
    """Tiles of a program's channels, side by side in their rows, as many as a stage holds."""
    pieces: gl.constexpr = STAGE_ROWS // CHANNELS
    row = gl.program_id(0) * CHANNELS
    if row < out_features:
        for start in range(0, in_features, pieces * LINE):
            stage = count % STAGES
            full = barriers[0].index(stage)
            _wait_for_room(barriers, count, STAGES, ASKED)
            mbarrier.expect(full, STAGE_ROWS * LINE)
            for piece in gl.static_range(pieces):
                tma.async_copy_global_to_shared(
                    desc, [row, start + piece * LINE], full, tiles.index(stage * pieces + piece)
                )
            count += 1
    return count


@gluon.jit
def _load_gates(
    desc,
    tiles,
    barriers,
    count,
    intermediate_size,
    hidden_size,
    STAGES: gl.constexpr,
    ASKED: gl.constexpr,
):
    """A tile of gates, one of what they are for, and so on."""
    row = gl.program_id(0) * GATES
    if row < intermediate_size:
        for start in range(0, hidden_size, LINE):
            for half in gl.static_range(2):
                stage = count % STAGES
                full = barriers[0].index(stage)
                _wait_for_room(barriers, count, STAGES, ASKED)
                mbarrier.expect(full, STAGE_ROWS * LINE)
                tma.async_copy_global_to_shared(
                    desc, [row + half * intermediate_size, start], full, tiles.index(stage)
                )
                count += 1
    return count


@gluon.jit
def tiles_of(tiles, CHANNELS: gl.constexpr, STAGES: gl.constexpr):
    """The ring of weights as tiles of so many rows."""
    num_tiles: gl.constexpr = STAGES * (STAGE_ROWS // CHANNELS)
    return tiles._reinterpret(  # noqa: SLF001
        tiles.dtype, [num_tiles, CHANNELS, LINE], tiles.layout
    )


@gluon.jit
def load_weights(
    descs,
    tiles,
    barriers,
    sizes,
    NARROW: gl.constexpr,
    QKV: gl.constexpr,
    STAGES: gl.constexpr,
    ASKED: gl.constexpr,
    HAS_NEXT: gl.constexpr,
):
    output_desc, gates_desc, down_desc, next_desc = descs
    _, attended_size, hidden_size, intermediate_size, next_size, _ = sizes
    narrow = tiles_of(tiles, NARROW, STAGES)
    count = gl.program_id(0) * 0
    count = _load_rows(
        output_desc,
        narrow,
        barriers,
        count,
        hidden_size,
        attended_size,
        NARROW,
        STAGES,
        ASKED,
    )
    count = _load_gates(
        gates_desc, tiles, barriers, count, intermediate_size,
        hidden_size, STAGES, ASKED,
    )  # fmt: skip
    count = _load_rows(
        down_desc,
        narrow,
        barriers,
        count,
        hidden_size,
        intermediate_size,
        NARROW,
        STAGES,
        ASKED,
    )
    if HAS_NEXT:
        _load_rows(
            next_desc, tiles_of(tiles, QKV, STAGES), barriers, count, next_size, hidden_size, QKV,
            STAGES, ASKED,
        )  # fmt: skip


@gluon.jit
def _load_tokens(
    desc,
    tiles,
    barriers,
    count,
    counters,
    which: gl.constexpr,
    num_arrivals,
    in_features,
    TOKENS: gl.constexpr,
    STAGES: gl.constexpr,
):
    full, empty = barriers
    wait_for(counters, which, num_arrivals, COPIES=True)
    for start in range(0, in_features, GROUP * LINE):
        stage = count % STAGES
        mbarrier.wait(empty.index(stage), (count // STAGES & 1) ^ 1)
        mbarrier.expect(full.index(stage), GROUP * TOKENS * LINE)
        for piece in gl.static_range(GROUP):
            tma.async_copy_global_to_shared(
                desc,
                [0, start + piece * LINE],
                full.index(stage),
                tiles.index(stage * GROUP + piece),
            )
        count += 1
    return count


@gluon.jit
def load_tokens(
    descs,
    tiles,
    barriers,
    counters,
    sizes,
    NARROW: gl.constexpr,
    QKV: gl.constexpr,
    TOKENS: gl.constexpr,
    STAGES: gl.constexpr,
    HAS_NEXT: gl.constexpr,
    PDL: gl.constexpr,
):
    # The predecessor may be another layer's kernel, which counts with the same counters.
    wait_for_predecessor(PDL)
    attended_desc, input_desc, activated_desc = descs
    num_tokens, attended_size, hidden_size, intermediate_size, next_size, _ = sizes
    program = gl.program_id(0)
    num_gates = intermediate_size // GATES
    is_narrow = program * NARROW < hidden_size
    count = program * 0
    if is_narrow:
        count = _load_tokens(
            attended_desc, tiles, barriers, count, counters, ATTENDED, num_tokens, attended_size,
            TOKENS, STAGES,
        )  # fmt: skip
    if program < num_gates:
        count = _load_tokens(
            input_desc, tiles, barriers, count, counters, MLP_INPUT, num_tokens, hidden_size,
            TOKENS, STAGES,
        )  # fmt: skip
    if is_narrow:
        count = _load_tokens(
            activated_desc, tiles, barriers, count, counters, ACTIVATED, num_gates,
            intermediate_size, TOKENS, STAGES,
        )  # fmt: skip
    if HAS_NEXT and program * QKV < next_size:
        _load_tokens(
            input_desc, tiles, barriers, count, counters, NEXT_INPUT, num_tokens, hidden_size,
            TOKENS, STAGES,
        )  # fmt: skip
