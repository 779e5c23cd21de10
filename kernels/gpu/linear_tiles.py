"""How linear layers of few tokens are cut into programs, by their shape."""

from dataclasses import dataclass

import torch

from kernels.gpu.cards import has_fast_memory

MAX_TOKENS = 64
FEW_TOKENS = 32
_FEW_FP8_TOKENS = 16
_MANY_ROWS = 16384
_LONG_ROWS = 8192


@dataclass(frozen=True, slots=True)
class LinearTile:
    """Weight rows and inner elements of a tile, programs a row tile, and how it is compiled.

    `prefetched` tiles are asked for before the predecessor has ended. Products of 8 bits are summed
    in the tensor cores' short accumulators over `summed` elements, then in float32.
    """

    rows: int = 64
    inner: int = 128
    splits: int = 1
    prefetched: int = 4
    summed: int = 128
    num_warps: int = 4
    num_stages: int = 6


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


def few_fp8_tokens(device: torch.device) -> int:
    """Up to here products of 8 bits quantize and gate on their way. With one tile of tokens more
    kernels of their own before and behind them cost less, and on an H200 for any number, with the
    tiles of more tokens, too (benchmarks/gpu/decode_layer.py)."""
    return 0 if has_fast_memory(device) else _FEW_FP8_TOKENS


def fp8_tile_for(
    num_tokens: int, out_features: int, in_features: int, *, gated: bool, device: torch.device
) -> LinearTile:
    """What measured fastest on an H100 for weights of 8 bits (benchmarks/gpu/fp8_linear.py)."""
    is_few = num_tokens <= few_fp8_tokens(device)
    if gated or out_features >= _MANY_ROWS:
        return LinearTile(inner=256, num_stages=4 if is_few else 3)
    splits = 2 if out_features <= in_features else 1
    if is_few:
        return LinearTile(inner=256, splits=splits)
    return LinearTile(splits=splits)
