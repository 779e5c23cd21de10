"""Linear layers over weights that are stored once, in the layout their device reads fastest."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class PackedLinear:
    """The only copy of a layer's weight; made by `pack_linear`.

    A projection that always follows another on the same input (q, k and v; gate and up) belongs
    into one PackedLinear with rows concatenated: one pass over the input, one call.
    """

    out_features: int
    in_features: int
    weight: Tensor
    bias: Tensor | None

    def unpacked(self) -> Tensor:
        """The weight as [out_features, in_features]; a copy if the layout differs."""
        return self.weight

    def embed(self, ids: Tensor) -> Tensor:
        """Rows `ids` [num_tokens] of the weight, [num_tokens, in_features]: a tied embedding."""
        return torch.nn.functional.embedding(ids, self.weight)


def pack_linear(weight: Tensor, bias: Tensor | None = None) -> PackedLinear:
    """Store `weight` [out_features, in_features] for `linear`. Drop the original afterwards.

    With bfloat16 on a CPU that has the instructions, the layout is our own; else it's torch's.
    """
    if weight.dim() != 2:
        raise ValueError(f"a linear weight has two dimensions, not {tuple(weight.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias is {tuple(bias.shape)} but weight {tuple(weight.shape)}")
    out_features, in_features = weight.shape
    return PackedLinear(out_features, in_features, weight.contiguous(), bias)


def linear(x: Tensor, packed: PackedLinear) -> Tensor:
    """`x @ weight.T + bias`: [num_tokens, in_features] to [num_tokens, out_features]."""
    if x.dim() != 2 or x.shape[1] != packed.in_features:
        raise ValueError(f"x is {tuple(x.shape)}, expected [num_tokens, {packed.in_features}]")
    return linear_reference(x, packed)


def linear_reference(x: Tensor, packed: PackedLinear) -> Tensor:
    """`linear` in torch."""
    return torch.nn.functional.linear(x, packed.unpacked(), packed.bias)
