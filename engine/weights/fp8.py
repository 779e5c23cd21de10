"""Weights of linear layers in 8 bits: as checkpoints store them, and as layers take them."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.models.quantization import Quantization
from engine.weights.source import WeightSource
from kernels.fp8 import FP8, Fp8Rows, quantize_weight
from protocol.errors import StartupError

# A stored value times its scale is the weight, whatever the scale's name says.
_WEIGHT_SCALES = ("weight_scale", "weight_scale_inv")
_INPUT_SCALES = ("input_scale", "activation_scale")


@dataclass(frozen=True, slots=True, eq=False)
class Fp8Weight:
    """`rows` is [out_features, in_features]; `input_scale` float32 [1], or None if it's dynamic."""

    rows: Fp8Rows
    input_scale: Tensor | None


def take_linear(source: WeightSource, shapes: Mapping[str, tuple[int, int]]) -> Tensor | Fp8Weight:
    """The weights of linear layers of the same input, one behind the other along their output
    channels; in 8 bits if all are stored so, or the model is to be quantized while loading.

    Raises StartupError as `WeightSource.take` does.
    """
    quantization = source.linear_format.quantization
    is_stored = [_is_stored(source, name) for name in shapes]
    if quantization is None or not any(is_stored):
        whole = source.take_stacked({f"{name}.weight": shape for name, shape in shapes.items()})
        is_new = quantization is not None and quantization.quantizes(shapes)
        return Fp8Weight(quantize_weight(whole), None) if is_new else whole
    if all(is_stored) and quantization.activations != "none":
        scales = [_row_scales(source, name, shape) for name, shape in shapes.items()]
        rows = [scale for scale in scales if scale is not None]
        if len(rows) == len(scales):
            names = {f"{name}.weight": shape for name, shape in shapes.items()}
            values = source.take_stacked(names, dtype=FP8)
            return Fp8Weight(Fp8Rows(values, torch.cat(rows)), _input_scale(source, shapes))
    return torch.cat([take_dense(source, name, shape) for name, shape in shapes.items()])


def take_dense(source: WeightSource, name: str, shape: tuple[int, int]) -> Tensor:
    """One layer's weight in the source's dtype, dequantized if it is stored in 8 bits."""
    quantization = source.linear_format.quantization
    if quantization is None or not _is_stored(source, name):
        return source.take(f"{name}.weight", shape)
    values = source.take(f"{name}.weight", shape, dtype=FP8)
    scales = _row_scales(source, name, shape)
    if scales is not None:
        return Fp8Rows(values, scales).dequantized(source.dtype)
    scale = _block_scales(source, name, shape, quantization)
    return (values.float() * scale).to(source.dtype)


def dense(weight: Fp8Weight | Tensor, dtype: torch.dtype) -> Tensor:
    """[out_features, in_features] in `dtype`."""
    return weight.rows.dequantized(dtype) if isinstance(weight, Fp8Weight) else weight


def _is_stored(source: WeightSource, name: str) -> bool:
    stored = source.stored(f"{name}.weight")
    return stored is not None and stored.dtype is FP8


def _row_scales(source: WeightSource, name: str, shape: tuple[int, int]) -> Tensor | None:
    """Float32 [out_features], or None if scales are of blocks."""
    scale = _take_scale(source, name)
    if scale.numel() != 1 and scale.shape not in ((shape[0],), (shape[0], 1)):
        return None
    return scale.reshape(-1).expand(shape[0]).contiguous()


def _block_scales(
    source: WeightSource, name: str, shape: tuple[int, int], quantization: Quantization
) -> Tensor:
    """Float32 [out_features, in_features]."""
    scale, block = _take_scale(source, name), quantization.block
    blocks = tuple(-(-size // by) for size, by in zip(shape, block, strict=True))
    if scale.shape != blocks:
        raise StartupError(
            f"The weight of {name!r} has a scale of shape {tuple(scale.shape)}; one of shape "
            f"{shape} wants 1, {shape[0]}, or {blocks} for blocks of {block}."
        )
    scale = scale.repeat_interleave(block[0], 0)[: shape[0]]
    return scale.repeat_interleave(block[1], 1)[:, : shape[1]]


def _take_scale(source: WeightSource, name: str) -> Tensor:
    scale = _take_first(source, name, _WEIGHT_SCALES)
    if scale is None:
        raise StartupError(f"The weight of {name!r} is stored in fp8, but has no scale.")
    return scale


def _input_scale(source: WeightSource, names: Mapping[str, object]) -> Tensor | None:
    """The widest of these layers, which share their input; None unless all have one."""
    quantization = source.linear_format.quantization
    if quantization is None or quantization.activations != "static":
        return None
    scales = [_take_first(source, name, _INPUT_SCALES) for name in names]
    known = [scale.reshape(1) for scale in scales if scale is not None]
    return torch.cat(known).max().reshape(1) if len(known) == len(scales) else None


def _take_first(source: WeightSource, name: str, suffixes: tuple[str, ...]) -> Tensor | None:
    for suffix in suffixes:
        stored = source.stored(f"{name}.{suffix}")
        if stored is not None:
            return source.take(f"{name}.{suffix}", stored.shape, dtype=torch.float32)
    return None
