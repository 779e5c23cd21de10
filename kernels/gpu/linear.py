"""Linear layers of few tokens: the weight is read once, as fast as the memory gives it.

The weight's rows are the large side of the matrix instruction, the tokens its small side. Where
there are too few tiles of rows to fill the card, the inner dimension is split over programs; the
last one of a tile to finish adds up what the others left, in a fixed order, so results don't vary.
"""

# A launch takes compile options beside the kernel's arguments.
# pyright: reportCallIssue=false

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.gpu.dependent_launch import (
    launch_options,
    let_successor_start,
    prefetch_to_l2,
    wait_for_predecessor,
)
from kernels.gpu.sizes import ceil_div, next_power_of_2

MAX_TOKENS = 64
_MIN_TOKENS = 16
_FEW_TOKENS = 32
_MANY_ROWS = 16384
_LONG_ROWS = 8192
LINE = tl.constexpr(64)  # elements of 16 bits
PREFETCHED_TILES = tl.constexpr(4)


@dataclass(frozen=True, slots=True)
class LinearTile:
    """Weight rows and inner elements of a tile, programs a row tile, and how it is compiled."""

    rows: int = 64
    inner: int = 128
    splits: int = 1
    num_warps: int = 4
    num_stages: int = 6


@triton.jit(do_not_specialize=["num_tokens"])
def _linear_kernel(
    x,
    weight,
    bias,
    out,
    partial,
    arrivals,
    num_tokens,
    out_features,
    in_features,
    x_stride,
    ROWS: tl.constexpr,
    INNER: tl.constexpr,
    TOKENS: tl.constexpr,
    SPLITS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    IS_EVEN: tl.constexpr,
    PDL: tl.constexpr,
):
    row_tile = tl.program_id(0)
    split = tl.program_id(1)
    rows = row_tile * ROWS + tl.arange(0, ROWS)
    tokens = tl.arange(0, TOKENS)
    inner = tl.arange(0, INNER)
    is_row = rows < out_features
    is_token = tokens < num_tokens
    num_tiles = tl.cdiv(in_features, INNER)
    tiles_per_split = tl.cdiv(num_tiles, SPLITS)
    first = split * tiles_per_split
    last = tl.minimum(first + tiles_per_split, num_tiles)
    # Rows past the end are read again from the last one, and not stored.
    weight_rows = weight + tl.minimum(rows, out_features - 1).to(tl.int64)[:, None] * in_features
    if PDL and IS_EVEN:
        # Nobody writes weights: their first tiles are on the way while the predecessor ends.
        lines = first * INNER + tl.arange(0, INNER // LINE) * LINE
        for ahead in tl.static_range(PREFETCHED_TILES):
            at = tl.minimum(lines + ahead * INNER, in_features - LINE)
            prefetch_to_l2(weight_rows + at[None, :])
    wait_for_predecessor(PDL)
    let_successor_start(PDL)
    sums = tl.zeros([ROWS, TOKENS], tl.float32)
    for tile in range(first, last):
        columns = tile * INNER + inner
        if IS_EVEN:
            w = tl.load(weight_rows + columns[None, :])
            values = tl.load(
                x + tokens[None, :] * x_stride + columns[:, None],
                mask=is_token[None, :],
                other=0.0,
            )
        else:
            is_column = columns < in_features
            w = tl.load(weight_rows + columns[None, :], mask=is_column[None, :], other=0.0)
            values = tl.load(
                x + tokens[None, :] * x_stride + columns[:, None],
                mask=is_token[None, :] & is_column[:, None],
                other=0.0,
            )
        sums = tl.dot(w, values, sums, input_precision="ieee")
    out_at = tokens[None, :] * out_features + rows[:, None]
    mask = is_row[:, None] & is_token[None, :]
    if SPLITS > 1:
        size = num_tokens * out_features
        tl.store(partial + split * size + out_at, sums, mask=mask)
        # Every thread's partial sums are written before the one that counts says so.
        tl.debug_barrier()
        arrived = tl.atomic_add(arrivals + row_tile, 1, sem="acq_rel")
        if arrived < SPLITS - 1:
            return
        tl.debug_barrier()
        sums = tl.zeros([ROWS, TOKENS], tl.float32)
        for other in range(SPLITS):
            sums += tl.load(
                partial + other * size + out_at, mask=mask, other=0.0, cache_modifier=".cg"
            )
        tl.store(arrivals + row_tile, 0)
    if HAS_BIAS:
        sums += tl.load(bias + rows, mask=is_row, other=0.0).to(tl.float32)[:, None]
    tl.store(out + out_at, sums, mask=mask)


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, *, tile: LinearTile | None = None
) -> Tensor:
    """`x @ weight.T + bias` for at most `MAX_TOKENS` rows of `x`, contiguous in the last dimension.

    All are of one type of 16 bits.
    `weight` is [out_features, in_features], contiguous. `tile` is for benchmarks.
    """
    num_tokens, in_features = x.shape
    out_features = weight.shape[0]
    tile = tile or tile_for(num_tokens, out_features, in_features)
    out = torch.empty((num_tokens, out_features), dtype=x.dtype, device=x.device)
    partial, arrivals = out, out
    num_row_tiles = ceil_div(out_features, tile.rows)
    if tile.splits > 1:
        shape = (tile.splits, num_tokens, out_features)
        partial = torch.empty(shape, dtype=torch.float32, device=x.device)
        arrivals = _arrivals(num_row_tiles, x.device)
    _linear_kernel[(num_row_tiles, tile.splits)](
        x,
        weight,
        bias,
        out,
        partial,
        arrivals,
        num_tokens,
        out_features,
        in_features,
        x.stride(0),
        ROWS=tile.rows,
        INNER=tile.inner,
        TOKENS=max(_MIN_TOKENS, next_power_of_2(num_tokens)),
        SPLITS=tile.splits,
        HAS_BIAS=bias is not None,
        IS_EVEN=in_features % tile.inner == 0,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        **launch_options(x.device),
    )
    return out


def is_fastest(num_tokens: int, out_features: int, in_features: int) -> bool:
    """Whether this beats the library on an H100 (benchmarks/gpu/kernels.py)."""
    if num_tokens <= _FEW_TOKENS:
        return True
    return num_tokens <= MAX_TOKENS and (out_features >= _MANY_ROWS or in_features >= _LONG_ROWS)


def tile_for(num_tokens: int, out_features: int, in_features: int) -> LinearTile:
    """What measured fastest on an H100 for shapes like this (benchmarks/gpu/kernels.py)."""
    is_few = num_tokens <= _FEW_TOKENS
    if out_features >= _MANY_ROWS and not is_few:
        return LinearTile(rows=128, num_stages=4)
    if in_features >= _LONG_ROWS:
        return LinearTile(splits=2)
    if out_features <= in_features and is_few:
        return LinearTile(inner=256, num_stages=4)
    return LinearTile()


_counters: dict[torch.device, Tensor] = {}


def _arrivals(num: int, device: torch.device) -> Tensor:
    """Counters of a device, zero between calls: kernels on one stream take turns with them."""
    counters = _counters.get(device)
    if counters is None or len(counters) < num:
        counters = torch.zeros(max(num, 4096), dtype=torch.int32, device=device)
        _counters[device] = counters
    return counters
