"""Cosines and sines of rotary position embeddings, for every kind of scaling in `rope_config`.

Frequencies that depend on a sequence's length (dynamic NTK, LongRoPE) get two tables, one behind
the other: rows `[0, max_len)` are for sequences up to the trained length, rows
`[max_len, 2 * max_len)` for longer ones. A sequence uses one of them from its first token to its
last, so its cached keys never mix two sets of frequencies; `ModelConfig.rope_row_offset` says
which.
"""

import math

import torch
from torch import Tensor

from engine.models.rope_config import (
    DynamicScaling,
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    NoScaling,
    RopeConfig,
    YarnScaling,
)


def rope_table(rope: RopeConfig, max_len: int, device: torch.device) -> Tensor:
    """float32 `[rows, rotary_dim]`: cosines, then sines, of each position's angles.

    `rows` is `max_len`, or twice that where the frequencies depend on the sequence's length and
    sequences of `max_len` tokens need the long ones.
    """
    seq_lens = [max_len]
    if rope.switch_len is not None and max_len > rope.switch_len:
        seq_lens = [rope.switch_len, max_len]
    positions = torch.arange(max_len, dtype=torch.float32)
    tables: list[Tensor] = []
    for seq_len in seq_lens:
        inverse_frequencies, factor = _inverse_frequencies(rope, seq_len)
        angles = torch.outer(positions, inverse_frequencies)
        tables.append(torch.cat((angles.cos(), angles.sin()), dim=-1) * factor)
    return torch.cat(tables).to(device)


def _inverse_frequencies(rope: RopeConfig, seq_len: int) -> tuple[Tensor, float]:
    """`[rotary_dim / 2]` radians a token, and what cosines and sines are multiplied with."""
    scaling = rope.scaling
    plain = 1.0 / _wavelengths(rope.theta, rope.rotary_dim)
    match scaling:
        case NoScaling():
            return plain, 1.0
        case LinearScaling():
            return plain / scaling.factor, 1.0
        case DynamicScaling():
            theta = _dynamic_theta(rope, scaling, seq_len)
            return 1.0 / _wavelengths(theta, rope.rotary_dim), 1.0
        case Llama3Scaling():
            return _llama3(plain, scaling), 1.0
        case YarnScaling():
            return _yarn(plain, rope, scaling), _yarn_attention_factor(scaling)
        case LongRopeScaling():
            is_long = seq_len > scaling.original_max_len
            divisors = torch.tensor(scaling.long_factors if is_long else scaling.short_factors)
            # Multiplied before the division, as everyone does: at position 5000 the last bit shows.
            frequencies = 1.0 / (divisors * _wavelengths(rope.theta, rope.rotary_dim))
            return frequencies, _longrope_attention_factor(scaling)


def _wavelengths(theta: float, rotary_dim: int) -> Tensor:
    """Each pair's wavelength in tokens, over 2π."""
    return theta ** (torch.arange(0, rotary_dim, 2, dtype=torch.float32) / rotary_dim)


def _dynamic_theta(rope: RopeConfig, scaling: DynamicScaling, seq_len: int) -> float:
    stretch = max(seq_len, scaling.original_max_len) / scaling.original_max_len
    exponent = rope.rotary_dim / (rope.rotary_dim - 2)
    return rope.theta * (scaling.factor * stretch - (scaling.factor - 1)) ** exponent


def _llama3(plain: Tensor, scaling: Llama3Scaling) -> Tensor:
    """How many wavelengths fit the trained length decides: few → divided, many → as it is."""
    periods = scaling.original_max_len * plain / (2 * math.pi)
    ramp = (periods - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    kept = ramp.clamp(0.0, 1.0)
    return (1 - kept) * plain / scaling.factor + kept * plain


def _yarn(plain: Tensor, rope: RopeConfig, scaling: YarnScaling) -> Tensor:
    """Dimensions below `low` keep their frequency, those above `high` are interpolated."""
    low = _yarn_dimension(rope, scaling.original_max_len, scaling.beta_fast)
    high = _yarn_dimension(rope, scaling.original_max_len, scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.rotary_dim - 1)
    dimensions = torch.arange(rope.rotary_dim // 2, dtype=torch.float32)
    # The paper's ramp has no width if both ends fall together; 0.001 makes it a step.
    ramp = ((dimensions - low) / max(high - low, 0.001)).clamp(0.0, 1.0)
    return plain / scaling.factor * ramp + plain * (1 - ramp)


def _yarn_dimension(rope: RopeConfig, max_len: int, num_rotations: float) -> float:
    """The dimension that turns `num_rotations` times over `max_len` tokens."""
    return (rope.rotary_dim * math.log(max_len / (num_rotations * 2 * math.pi))) / (
        2 * math.log(rope.theta)
    )


def _yarn_attention_factor(scaling: YarnScaling) -> float:
    def mscale(weight: float) -> float:
        return 1.0 if scaling.factor <= 1 else 0.1 * weight * math.log(scaling.factor) + 1.0

    if scaling.attention_factor is not None:
        return scaling.attention_factor
    if scaling.mscale and scaling.mscale_all_dim:
        return mscale(scaling.mscale) / mscale(scaling.mscale_all_dim)
    return mscale(1.0)


def _longrope_attention_factor(scaling: LongRopeScaling) -> float:
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    if scaling.factor <= 1.0:
        return 1.0
    return math.sqrt(1 + math.log(scaling.factor) / math.log(scaling.original_max_len))
