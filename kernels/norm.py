"""RMS normalisation, alone and fused with the residual addition before it."""

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Normalise the last dimension: `x / sqrt(mean(x²) + eps) * weight`.

    `x` is [..., hidden], with any strides before the last dimension; `weight` [hidden]. The
    arithmetic is float32 and rounds once, to `x`'s dtype.
    """
    _check(x, weight)
    return rms_norm_reference(x, weight, eps)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return `(rms_norm(x + residual), x + residual)`; both inputs may be overwritten.

    The caller must use the returned residual and forget `x` and `residual`.
    """
    _check(x, weight)
    if x.shape != residual.shape:
        raise ValueError(f"x is {tuple(x.shape)} but residual {tuple(residual.shape)}")
    return add_rms_norm_reference(x, residual, weight, eps)


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`rms_norm` in torch."""
    if x.dtype is torch.float32:
        return torch.nn.functional.rms_norm(x, weight.shape, weight, eps)
    x32 = x.float()
    scale = torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)
    return (x32 * scale * weight.float()).to(x.dtype)


def add_rms_norm_reference(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """`add_rms_norm` in torch."""
    residual = x + residual
    return rms_norm_reference(residual, weight, eps), residual


def _check(x: Tensor, weight: Tensor) -> None:
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"weight is {tuple(weight.shape)} but x {tuple(x.shape)}")
