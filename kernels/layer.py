"""What a decoder layer computes between its attention and the next layer's, in one kernel."""

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.activation import silu_and_mul_reference
from kernels.fp8 import Fp8Rows, quantize_rows_reference
from kernels.norm import rms_norm_reference

# Channels of the MLP's activations that have a scale of their own.
ACTIVATION_BLOCK = 128


@dataclass(frozen=True, slots=True, eq=False)
class LayerWeights:
    """A layer's weights behind attention, of 8 bits but for the norm's."""

    output: Fp8Rows
    """[hidden_size, num_heads * head_dim]."""
    norm: Tensor
    gate_up: Fp8Rows
    """[2 * intermediate_size, hidden_size]."""
    down: Fp8Rows


@dataclass(frozen=True, slots=True, eq=False)
class NextWeights:
    """The next layer's weights before attention."""

    norm: Tensor
    qkv: Fp8Rows


def joins_products(
    weights: LayerWeights, following: NextWeights | None, num_tokens: int, dtype: torch.dtype
) -> bool:
    """Whether `joined_products` takes these, and is faster than kernels of their own."""
    device = weights.down.values.device
    if device.type != "cuda" or not num_tokens:
        return False
    from kernels.gpu.hopper.layer_shapes import tile_for

    return tile_for(weights, following, num_tokens, dtype) is not None


def joined_products(
    attended: Tensor,
    stream: Tensor,
    weights: LayerWeights,
    following: NextWeights | None,
    eps: float,
) -> Tensor | None:
    """Adds attention's output product and the MLP's to the residual `stream`, in place.

    `attended` is [num_tokens, num_heads * head_dim], `stream` [num_tokens, hidden_size]; both are
    contiguous. Returns the product of the next layer's queries, keys and values
    [num_tokens, qkv_size], or None if nothing is `following`. Products' inputs are quantized on the
    way, with a scale for each token, and activations for each of its blocks of `ACTIVATION_BLOCK`.
    Only one stream of a device at a time may run it: its programs meet at counters that all calls
    share. Raises ValueError where `joins_products` is false.
    """
    # Imported on first use: not every Triton has Gluon.
    from kernels.gpu.hopper.layer import layer_products
    from kernels.gpu.hopper.layer_shapes import tile_for

    tile = tile_for(weights, following, len(stream), stream.dtype)
    if tile is None:
        raise ValueError("these products aren't joined")
    return layer_products(attended, stream, weights, following, eps, tile=tile)


def joined_products_reference(
    attended: Tensor,
    stream: Tensor,
    weights: LayerWeights,
    following: NextWeights | None,
    eps: float,
) -> Tensor | None:
    """`joined_products` in torch."""
    dtype = stream.dtype
    stream += _product(attended, weights.output).to(dtype)
    normed = rms_norm_reference(stream.float(), weights.norm.float(), eps)
    activated = silu_and_mul_reference(_product(normed, weights.gate_up))
    stream += _product(activated, weights.down, block=ACTIVATION_BLOCK).to(dtype)
    if following is None:
        return None
    normed = rms_norm_reference(stream.float(), following.norm.float(), eps)
    return _product(normed, following.qkv).to(dtype)


def _product(x: Tensor, weight: Fp8Rows, *, block: int | None = None) -> Tensor:
    blocks = x.reshape(-1, block or x.shape[1])
    rounded = quantize_rows_reference(blocks, num_tried=1).dequantized(torch.float32).view_as(x)
    return rounded @ weight.dequantized(torch.float32).T
