"""What a decoder layer computes between its attention and the next layer's, in one kernel."""

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.fp8 import Fp8Rows


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
    way, with a scale for each token.
    """
    # Imported on first use: not every Triton has Gluon.
    from kernels.gpu.hopper.layer import layer_products
    from kernels.gpu.hopper.layer_shapes import tile_for

    tile = tile_for(weights, following, len(stream), stream.dtype)
    if tile is None:
        raise ValueError("these products aren't joined")
    return layer_products(attended, stream, weights, following, eps, tile=tile)
