"""How attention of one query a sequence is cut into programs."""

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.kv_format import FP8_DTYPES

MAX_SPLITS = 32
# More parts are merged faster by programs of their own than by one of each head.
MAX_FUSED_SPLITS = 16
# Programs on the card at a time that keep its memory busy, over those that start one after another.
_PROGRAMS_PER_PROCESSOR = 4
_FEW_PAIRS = 32
# For which widening in assembly was measured; others leave it to the compiler.
ASSEMBLY_HEAD_DIM = 128


@dataclass(frozen=True, slots=True)
class DecodeTile:
    """Tokens a program takes at a time, and how it is compiled.

    Of its first `prefetched` tiles, keys and values are asked for before the predecessor has ended.
    """

    tokens: int
    num_warps: int
    num_stages: int
    prefetched: int = 0


def tile_for(head_dim: int, kv_bytes: int, num_pairs: int) -> DecodeTile:
    """What measured fastest on an H100 (benchmarks/gpu/kernels.py), for so many sequences and
    heads. Few warps: each exchange between them, for the maximum, the sum and the weights, makes
    all wait."""
    if head_dim * kv_bytes > 256:
        return DecodeTile(tokens=32, num_warps=4, num_stages=2)
    if kv_bytes > 1:
        return DecodeTile(tokens=64, num_warps=2, num_stages=3)
    if num_pairs <= _FEW_PAIRS:
        return DecodeTile(tokens=64, num_warps=4, num_stages=3)
    num_stages = 4 if head_dim == ASSEMBLY_HEAD_DIM else 6
    return DecodeTile(
        tokens=32, num_warps=1 if head_dim <= ASSEMBLY_HEAD_DIM else 2, num_stages=num_stages
    )


def splits_for(num_pairs: int, max_kv_len: int, kv_pool: Tensor) -> int:
    """Programs for each of `num_pairs` sequences and heads, a power of two, so that the card is
    full and few are idle."""
    if not kv_pool.is_cuda:
        return 4
    programs = _PROGRAMS_PER_PROCESSOR * _num_processors(kv_pool.device)
    if kv_pool.dtype in FP8_DTYPES:
        programs *= 2  # of a single warp
    wanted = max(1, programs // num_pairs)
    useful = max(1, max_kv_len // 128)
    return min(MAX_SPLITS, 1 << (min(wanted, useful).bit_length() - 1))


def _num_processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
