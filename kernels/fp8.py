"""Rows of 8-bit floating point numbers (e4m3), each row with a scale of its own."""

from dataclasses import dataclass

import torch
from torch import Tensor

FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0
_MIN_LARGEST = 1e-12
_TRIED_SCALES = 2
_TRIED_SCALES_OF_WEIGHTS = 8
_ROWS_AT_ONCE = 4096


@dataclass(frozen=True, slots=True, eq=False)
class Fp8Rows:
    """A matrix: tokens that a linear layer takes, or the output channels of its weight."""

    values: Tensor
    """float8_e4m3fn [num_rows, size]."""
    scales: Tensor
    """float32 [num_rows]; row i stands for `values[i] * scales[i]`."""

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """[num_rows, size]."""
        return (self.values.float() * self.scales[:, None]).to(dtype)


def quantize_rows(x: Tensor, scale: Tensor | None = None) -> Fp8Rows:
    """`x` [num_rows, size] in 8 bits, each row with a scale of its own.

    Scaled so that a row's largest value is the largest there is, or to 1 / sqrt(2) of that: what
    leaves the less squared error, since what a number loses depends on where it falls between two
    powers of two. With `scale`, a float32 tensor of one element, all rows have that one, and what
    lies outside of its range becomes the largest value.
    """
    if x.is_cuda and x.stride(1) == 1:
        from kernels.gpu import fp8 as gpu

        return gpu.quantize_rows(x, scale)
    return quantize_rows_reference(x, scale)


def quantize_rows_reference(
    x: Tensor, scale: Tensor | None = None, *, num_tried: int = _TRIED_SCALES
) -> Fp8Rows:
    """`quantize_rows` in torch, with the best of `num_tried` scales: the least, and that times 2 to
    the power of 1 / num_tried, 2 / num_tried, and so on."""
    x = x.float()
    if scale is not None:
        return _scaled(x, scale.reshape(1).expand(x.shape[0]).contiguous())
    least = x.abs().amax(dim=1).clamp_(min=_MIN_LARGEST) / FP8_MAX
    best, least_error = least, torch.full_like(least, torch.inf)
    for i in range(num_tried):
        scales = least * 2 ** (i / num_tried)
        error = (_scaled(x, scales).dequantized(torch.float32) - x).square_().sum(dim=1)
        best = torch.where(error < least_error, scales, best)
        least_error = torch.minimum(error, least_error)
    return _scaled(x, best)


def _scaled(x: Tensor, scales: Tensor) -> Fp8Rows:
    return Fp8Rows((x / scales[:, None]).clamp_(-FP8_MAX, FP8_MAX).to(FP8), scales)


def quantize_weight(weight: Tensor) -> Fp8Rows:
    """`weight` [out_features, in_features] in 8 bits, with the best of more scales than inputs
    have: it runs once, when a model is loaded."""
    parts = [
        quantize_rows_reference(rows, num_tried=_TRIED_SCALES_OF_WEIGHTS)
        for rows in weight.split(_ROWS_AT_ONCE)
    ]
    # Not every operation knows float8; bytes are as good.
    values = torch.cat([part.values.view(torch.uint8) for part in parts]).view(FP8)
    return Fp8Rows(values, torch.cat([part.scales for part in parts]))
