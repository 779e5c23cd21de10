"""Linear layers over weights of 8 bits (e4m3), with a scale for each output channel."""

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.activation import silu_and_mul, silu_and_mul_fp8
from kernels.fp8 import Fp8Rows, quantize_rows

# Tensor cores multiply fp8 from here on (Ada, Hopper); the library wants whole 16-byte rows.
_FIRST_CAPABILITY = (8, 9)
_MULTIPLE = 16


@dataclass(frozen=True, slots=True, eq=False)
class Fp8Linear:
    """A layer's weight, and the scale of its inputs if the checkpoint has one.

    Like `PackedLinear`, it may hold several projections of one input, with rows concatenated.
    """

    weight: Fp8Rows
    """[out_features, in_features]."""
    bias: Tensor | None
    input_scale: Tensor | None
    """float32 [1], or None: each token has its own, made when it comes."""

    def from_channel(self, first: int) -> "Fp8Linear":
        """The layer of output channels `first` and up; its memory is a part of this one's."""
        weight = Fp8Rows(self.weight.values[first:], self.weight.scales[first:])
        bias = None if self.bias is None else self.bias[first:]
        return Fp8Linear(weight, bias, self.input_scale)


def multiplies_fp8(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a model in `dtype` on `device` gains by fp8 products."""
    return (
        device.type == "cuda"
        and dtype is not torch.float32
        and torch.cuda.get_device_capability(device) >= _FIRST_CAPABILITY
    )


def fits_fp8(out_features: int, in_features: int) -> bool:
    """Whether `fp8_linear` takes a weight of this shape."""
    return out_features % _MULTIPLE == 0 and in_features % _MULTIPLE == 0


def fp8_linear(x: Tensor | Fp8Rows, packed: Fp8Linear, *, dtype: torch.dtype) -> Tensor:
    """`x @ weight.T + bias` in `dtype`: [num_tokens, in_features] to [num_tokens, out_features].

    An `x` that isn't quantized yet is quantized on the way: with a scale for each token, or finer.
    """
    _check(x, packed)
    if packed.weight.values.is_cuda:
        from kernels.gpu import fp8_linear as gpu

        return gpu.fp8_linear(x, packed, dtype=dtype)
    return fp8_linear_reference(x, packed, dtype=dtype)


def add_fp8_linear(x: Tensor | Fp8Rows, packed: Fp8Linear, residual: Tensor) -> bool:
    """`residual += fp8_linear(x, packed)` where the product adds on its way; elsewhere nothing,
    False.

    `residual` is [num_tokens, out_features]. The sum is rounded once.
    """
    _check(x, packed)
    if not packed.weight.values.is_cuda or not residual.is_contiguous():
        return False
    from kernels.gpu import fp8_linear as gpu

    return gpu.add_fp8_linear(x, packed, residual)


def unscaled_sums(x: Fp8Rows, weight: Fp8Rows) -> Tensor | None:
    """`x.values @ weight.values.T` in bfloat16, [num_tokens, out_features], where the product is
    faster if it leaves scales to what comes next; else None."""
    if not weight.values.is_cuda:
        return None
    from kernels.gpu import fp8_linear as gpu

    return gpu.unscaled_sums(x, weight)


def gated_fp8_linear(
    x: Tensor | Fp8Rows, packed: Fp8Linear, *, dtype: torch.dtype, then: Fp8Linear | None
) -> Tensor | Fp8Rows:
    """`silu_and_mul` of `fp8_linear`, whose first half of output channels are the gates.

    [num_tokens, in_features] to [num_tokens, out_features / 2]: in `dtype`, or 8 bits where that
    is the better input for the layer that comes `then`.
    """
    _check(x, packed)
    if packed.weight.values.is_cuda:
        from kernels.gpu import fp8_linear as gpu

        if gpu.gates_at_once(x):
            return gpu.gated_fp8_linear(x, packed, dtype=dtype)
        is_plain = packed.bias is None and dtype is torch.bfloat16
        if then is not None and is_plain and isinstance(x, Fp8Rows):
            sums = unscaled_sums(x, packed.weight)
            if sums is not None:
                scales = x.scales, packed.weight.scales
                return silu_and_mul_fp8(sums, scale=then.input_scale, scales=scales)
    gate_up = fp8_linear(x, packed, dtype=dtype)
    if then is None:
        return silu_and_mul(gate_up)
    return silu_and_mul_fp8(gate_up, scale=then.input_scale)


def fp8_linear_reference(x: Tensor | Fp8Rows, packed: Fp8Linear, *, dtype: torch.dtype) -> Tensor:
    """`fp8_linear` in torch: products of 8 bits, summed in float32."""
    rows = quantized(x, packed)
    sums = rows.values.float() @ packed.weight.values.float().T
    out = sums * rows.scales[:, None] * packed.weight.scales
    if packed.bias is not None:
        out += packed.bias.float()
    return out.to(dtype)


def quantized(x: Tensor | Fp8Rows, packed: Fp8Linear) -> Fp8Rows:
    """`x` as the product of 8 bits takes it, by a kernel before it."""
    return x if isinstance(x, Fp8Rows) else quantize_rows(x, packed.input_scale)


def _check(x: Tensor | Fp8Rows, packed: Fp8Linear) -> None:
    shape = x.values.shape if isinstance(x, Fp8Rows) else x.shape
    if shape[1] != packed.weight.values.shape[1]:
        raise ValueError(f"x is {tuple(shape)} but weight {tuple(packed.weight.values.shape)}")
