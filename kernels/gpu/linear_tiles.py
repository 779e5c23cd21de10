"""How linear layers of few tokens are cut into programs, by their shape."""

import functools
from dataclasses import dataclass, replace

MAX_TOKENS = 64
FEW_TOKENS = 32
_MANY_ROWS = 16384
_LONG_ROWS = 8192
# Up to so many tokens, products of 16 and of 8 bits take the norm of their inputs themselves.
NORM_IN_PRODUCT_TOKENS = 4
NORM_IN_FP8_PRODUCT_TOKENS = 4


@dataclass(frozen=True, slots=True)
class LinearTile:
    """Weight rows and inner elements of a tile, programs a row tile, and how it is compiled.

    `prefetched` tiles are asked for before the predecessor has ended. Products of 8 bits are summed
    in the tensor cores' short accumulators over `summed` elements, then in float32. Fewer tokens
    than `least_tokens`, a power of two from 8 on, are padded to that.
    """

    rows: int = 64
    inner: int = 128
    splits: int = 1
    prefetched: int = 4
    summed: int = 128
    num_warps: int = 4
    num_stages: int = 6
    least_tokens: int = 16


def is_fastest(num_tokens: int, out_features: int, in_features: int) -> bool:
    """Whether this beats the library on an H100 (benchmarks/gpu/kernels.py)."""
    if num_tokens <= FEW_TOKENS:
        return True
    return num_tokens <= MAX_TOKENS and (out_features >= _MANY_ROWS or in_features >= _LONG_ROWS)


def tile_for(num_tokens: int, out_features: int, in_features: int) -> LinearTile:
    """What measured fastest on an H100 for shapes like this (benchmarks/gpu/kernels.py)."""
    is_few = num_tokens <= FEW_TOKENS
    if out_features >= _MANY_ROWS and not is_few:
        return LinearTile(rows=128, num_stages=4)
    if in_features >= _LONG_ROWS:
        return LinearTile(splits=2)
    if out_features <= in_features and is_few:
        return LinearTile(inner=256, num_stages=4)
    return LinearTile()


def fp8_tile_for(
    num_tokens: int, out_features: int, in_features: int, *, gated: bool
) -> LinearTile:
    """What measured fastest on an H100 for weights of 8 bits (benchmarks/gpu/fp8_linear.py)."""
    if gated or out_features >= _MANY_ROWS:
        return LinearTile(inner=256, num_stages=4 if num_tokens <= FEW_TOKENS else 3)
    splits = 2 if out_features <= in_features else 1
    if num_tokens <= FEW_TOKENS:
        return LinearTile(inner=256, splits=splits)
    return LinearTile(splits=splits)


def normalises(num_tokens: int, out_features: int, in_features: int, *, is_fp8: bool) -> bool:
    """Whether a product that takes the norm itself is faster than a kernel for that before it."""
    limit = NORM_IN_FP8_PRODUCT_TOKENS if is_fp8 else NORM_IN_PRODUCT_TOKENS
    if not 0 < num_tokens <= limit:
        return False
    choose = functools.partial(fp8_tile_for, gated=False) if is_fp8 else tile_for
    return choose(num_tokens, out_features, in_features).splits == 1


def normed_tile_for(
    num_tokens: int, out_features: int, in_features: int, *, is_fp8: bool, gated: bool = False
) -> LinearTile:
    """For products that take the norm of their inputs, of which a program needs whole rows."""
    if is_fp8:
        return replace(fp8_tile_for(num_tokens, out_features, in_features, gated=gated), splits=1)
    # Of tiles that are less long, the norm's weights are too few for copies ahead of time.
    return LinearTile(inner=256, num_stages=4)
