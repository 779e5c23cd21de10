"""Which layers a kernel takes whole, and how they are cut; asking doesn't import it."""

import functools
from dataclasses import dataclass

import torch

from kernels.gpu.cards import has_fast_memory, num_multiprocessors, shares_multiprocessors
from kernels.gpu.hopper.support import is_hopper
from kernels.layer import ACTIVATION_BLOCK, LayerWeights, NextWeights

# Bytes of a row in a tile, and tiles of tokens in a stage.
LINE_BYTES, GROUP = 128, 4
# Rows of weights in a stage, and gates of a program: a stage is a tile of them, or of what they are
# for. The activations that they make are a block with a scale of its own, as wide as a tile.
STAGE_ROWS = GATES = ACTIVATION_BLOCK
MAX_TOKENS = 64
# Output channels of a program in other products, as far as they are measured: of attention's output
# and the MLP's, and of queries, keys and values.
_NARROW, _QKV = (32,), (32, 64)
# Programs that must have something to do, of the card's multiprocessors: fewer don't read weights
# as fast as kernels of their own, which cut them smaller.
_LEAST_USED = 0.7
# By the most tokens: stages of weights and of tokens, as shared memory has room for them.
_STAGES = {16: (8, 8), 32: (8, 4), 64: (6, 3)}
# For fewer tokens it's no faster on an H100; on an H200 it is, and more is to be asked for at a
# time (benchmarks/gpu/decode_layer.py).
_LEAST_TOKENS, _ASKED = 9, 3
_FAST_LEAST_TOKENS, _FAST_ASKED = 1, 4


@dataclass(frozen=True, slots=True)
class LayerTile:
    """`tokens` are loaded a tile, in `token_stages` of half a KiB a token; weights in `stages` of
    16 KiB, `asked` of which are on their way at most. A program has so many channels of the narrow
    products, attention's output and the MLP's, and of queries, keys and values."""

    tokens: int = 16
    stages: int = 8
    token_stages: int = 8
    asked: int = _ASKED
    narrow: int = 32
    qkv: int = 64


def tile_for(
    weights: LayerWeights, following: NextWeights | None, num_tokens: int, dtype: torch.dtype
) -> LayerTile | None:
    """None where kernels of their own are faster, or the only ones."""
    device = weights.down.values.device
    if (
        num_tokens > MAX_TOKENS
        or dtype not in (torch.bfloat16, torch.float16)
        or not is_hopper(device)
        or shares_multiprocessors()
        or num_tokens < least_tokens(device)
    ):
        return None
    hidden_size, intermediate_size = weights.down.values.shape
    attended_size = weights.output.values.shape[1]
    qkv_size = following.qkv.values.shape[0] if following is not None else None
    sizes = (attended_size, hidden_size, intermediate_size, qkv_size)
    return _tile_for(num_tokens, *sizes, num_multiprocessors(device), stages_asked(device))


def least_tokens(device: torch.device) -> int:
    """The fewest whose layers are taken whole."""
    return _FAST_LEAST_TOKENS if has_fast_memory(device) else _LEAST_TOKENS


def stages_asked(device: torch.device) -> int:
    """`LayerTile.asked` for this card."""
    return _FAST_ASKED if has_fast_memory(device) else _ASKED


@functools.cache
def _tile_for(
    num_tokens: int,
    attended_size: int,
    hidden_size: int,
    intermediate_size: int,
    qkv_size: int | None,
    num_programs: int,
    asked: int,
) -> LayerTile | None:
    narrow = _channels(hidden_size, (attended_size, intermediate_size), _NARROW, num_programs)
    gates = _channels(intermediate_size, (hidden_size,), (GATES,), num_programs)
    qkv = _QKV[-1]
    if qkv_size is not None:
        qkv = _channels(qkv_size, (hidden_size,), _QKV, num_programs)
    if narrow is None or gates is None or qkv is None:
        return None
    num_narrow = hidden_size // narrow
    # Who has a share of the last product has met the others before: counters are set back between.
    has_met = qkv_size is None or qkv_size // qkv <= max(num_narrow, intermediate_size // gates)
    if num_tokens > num_narrow or not has_met:
        return None
    tokens = next(tokens for tokens in _STAGES if num_tokens <= tokens)
    stages, token_stages = _STAGES[tokens]
    return LayerTile(
        tokens=tokens,
        stages=stages,
        token_stages=token_stages,
        asked=asked,
        narrow=narrow,
        qkv=qkv,
    )


def _channels(
    size: int, in_features: tuple[int, ...], choices: tuple[int, ...], num_programs: int
) -> int | None:
    """The fewest channels a program, so that all have some at once."""
    for channels in choices:
        stage_columns = max(GROUP, STAGE_ROWS // channels) * LINE_BYTES
        if (
            size % channels == 0
            and num_programs * _LEAST_USED <= size // channels <= num_programs
            and all(features % stage_columns == 0 for features in in_features)
        ):
            return channels
    return None
