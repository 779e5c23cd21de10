"""Linear layers of a decoder, each with the operation before it, as its number format wants it."""

from collections.abc import Hashable
from typing import Protocol

import torch
from torch import Tensor

from engine.weights.fp8 import Fp8Weight, dense, take_linear
from engine.weights.source import WeightSource
from kernels.activation import silu_and_mul, silu_and_mul_fp8
from kernels.fp8 import Fp8Rows
from kernels.fp8_linear import (
    Fp8Linear,
    add_fp8_linear,
    fits_fp8,
    fp8_linear,
    gated_fp8_linear,
)
from kernels.linear import PackedLinear, add_linear, linear, pack_linear
from kernels.norm import add_rms_norm, add_rms_norm_fp8

PART_MULTIPLE = 32
"""Output channels from which on a part of a projection may begin."""

ProjectionInput = Tensor | Fp8Rows
"""[num_tokens, in_features]."""


class Projection(Protocol):
    """`x @ weight.T + bias`, for one projection or several of the same input, joined."""

    @property
    def kind(self) -> Hashable:
        """Projections of one kind launch the same kernels for the same input."""
        ...

    def forward(self, x: ProjectionInput) -> Tensor:
        """[num_tokens, in_features] to [num_tokens, out_features]."""
        ...

    def from_channel(self, first: int) -> "Projection":
        """The one to output channels `first` and up, a multiple of `PART_MULTIPLE`, with the same
        memory."""
        ...

    def onto(self, x: ProjectionInput, residual: Tensor) -> Tensor | None:
        """`forward`, for the residual stream: None if the result was added to it on the way."""
        ...

    def normed(
        self, x: Tensor | None, residual: Tensor, norm: Tensor, eps: float
    ) -> tuple[ProjectionInput, Tensor]:
        """The input that `add_rms_norm` makes, and the new residual; `x` and `residual` are
        overwritten."""
        ...

    def forward_gated(self, x: ProjectionInput, *, then: "Projection") -> ProjectionInput:
        """`silu_and_mul` of what `forward` returns, as the projection that comes `then` likes it.

        [num_tokens, in_features] to [num_tokens, out_features / 2].
        """
        ...


class DenseProjection:
    """Weights in the model's own type."""

    def __init__(self, packed: PackedLinear) -> None:
        self._packed = packed

    @property
    def kind(self) -> Hashable:
        packed = self._packed
        return "dense", packed.out_features, packed.in_features, packed.bias is not None

    def forward(self, x: ProjectionInput) -> Tensor:
        assert isinstance(x, Tensor)
        return linear(x, self._packed)

    def from_channel(self, first: int) -> Projection:
        return DenseProjection(self._packed.from_channel(first))

    def onto(self, x: ProjectionInput, residual: Tensor) -> Tensor | None:
        assert isinstance(x, Tensor)
        return None if add_linear(x, self._packed, residual) else self.forward(x)

    def normed(
        self, x: Tensor | None, residual: Tensor, norm: Tensor, eps: float
    ) -> tuple[ProjectionInput, Tensor]:
        return add_rms_norm(x, residual, norm, eps)

    def forward_gated(self, x: ProjectionInput, *, then: Projection) -> ProjectionInput:
        assert isinstance(x, Tensor)
        gate_up = linear(x, self._packed)
        if isinstance(then, Fp8Projection):
            return silu_and_mul_fp8(gate_up, scale=then.packed.input_scale)
        return silu_and_mul(gate_up)


class Fp8Projection:
    """Weights and inputs of 8 bits. What makes the input quantizes it on the way."""

    def __init__(self, packed: Fp8Linear, dtype: torch.dtype) -> None:
        self.packed = packed
        self._dtype = dtype

    @property
    def kind(self) -> Hashable:
        packed = self.packed
        shape = packed.weight.values.shape
        return "fp8", *shape, packed.bias is not None, packed.input_scale is not None

    def forward(self, x: ProjectionInput) -> Tensor:
        return fp8_linear(x, self.packed, dtype=self._dtype)

    def from_channel(self, first: int) -> Projection:
        return Fp8Projection(self.packed.from_channel(first), self._dtype)

    def onto(self, x: ProjectionInput, residual: Tensor) -> Tensor | None:
        return None if add_fp8_linear(x, self.packed, residual) else self.forward(x)

    def normed(
        self, x: Tensor | None, residual: Tensor, norm: Tensor, eps: float
    ) -> tuple[ProjectionInput, Tensor]:
        return add_rms_norm_fp8(x, residual, norm, eps, scale=self.packed.input_scale)

    def forward_gated(self, x: ProjectionInput, *, then: Projection) -> ProjectionInput:
        next_packed = then.packed if isinstance(then, Fp8Projection) else None
        return gated_fp8_linear(x, self.packed, dtype=self._dtype, then=next_packed)


def load_projection(
    weights: WeightSource, prefix: str, sizes: dict[str, int], in_features: int, *, bias: bool
) -> Projection:
    """Takes `{prefix}.{name}` for each name with its number of output channels in `sizes`.

    It is an fp8 one if all of them are quantized and the device multiplies fp8; else weights are
    dequantized, once, here.
    """
    weight = take_linear(
        weights, {f"{prefix}.{name}": (size, in_features) for name, size in sizes.items()}
    )
    biases = {f"{prefix}.{name}.bias": (size,) for name, size in sizes.items()}
    joined_bias = weights.take_stacked(biases) if bias else None
    fits = weights.linear_format.multiplies_fp8 and fits_fp8(sum(sizes.values()), in_features)
    if fits and isinstance(weight, Fp8Weight):
        packed = Fp8Linear(weight.rows, joined_bias, weight.input_scale)
        return Fp8Projection(packed, weights.dtype)
    return DenseProjection(pack_linear(dense(weight, weights.dtype), joined_bias))
