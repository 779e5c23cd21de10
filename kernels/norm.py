"""RMS normalisation, alone and fused with the residual addition before it."""

from ctypes import byref
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.fp8 import Fp8Rows, quantize_rows_reference
from kernels.native.arguments import AddRmsNormArgs, RmsNormArgs
from kernels.native.library import Operation, native_kernel


@dataclass(frozen=True, slots=True, eq=False)
class HeadNorms:
    """`rms_norm` of each head of q and of k, with weights [head_dim], before RoPE."""

    q: Tensor
    k: Tensor
    eps: float


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Normalise the last dimension: `x / sqrt(mean(x²) + eps) * weight`.

    `x` is [..., hidden], with any strides before the last dimension; `weight` [hidden]. The
    arithmetic is float32 and rounds once, to `x`'s dtype.
    """
    _check(x, weight)
    dim, size = x.dim(), weight.shape[0]
    if x.is_cuda and dim <= 3 and x.stride(-1) == 1:
        from kernels.gpu import norm as gpu

        return gpu.rms_norm(x, weight, eps)
    kernel = native_kernel(Operation.RMS_NORM, x)
    if kernel is None or weight.dtype is not x.dtype or dim > 3 or x.stride(-1) != 1:
        return rms_norm_reference(x, weight, eps)
    out = torch.empty(x.shape, dtype=x.dtype)
    # Read as [outer, inner, size], so that heads in a fused qkv tensor need no copy.
    args = RmsNormArgs(
        x=x.data_ptr(),
        weight=weight.data_ptr(),
        out=out.data_ptr(),
        outer=x.shape[0] if dim > 1 else 1,
        inner=x.shape[1] if dim > 2 else 1,
        n=size,
        outer_stride=x.stride(0) if dim > 1 else 0,
        inner_stride=x.stride(1) if dim > 2 else 0,
        num_threads=torch.get_num_threads(),
        eps=eps,
    )
    kernel(byref(args))
    return out


def add_rms_norm(
    x: Tensor | None, residual: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Return `(rms_norm(x + residual), x + residual)`; both inputs may be overwritten.

    The caller must use the returned residual and forget `x` and `residual`. No `x` adds nothing.
    """
    if x is None:
        return rms_norm(residual, weight, eps), residual
    _check(x, weight)
    if x.shape != residual.shape:
        raise ValueError(f"x is {tuple(x.shape)} but residual {tuple(residual.shape)}")
    is_contiguous = x.is_contiguous() and residual.is_contiguous()
    if x.is_cuda and is_contiguous:
        from kernels.gpu import norm as gpu

        return gpu.add_rms_norm(x, residual, weight, eps)
    kernel = native_kernel(Operation.ADD_RMS_NORM, x)
    has_one_dtype = x.dtype is residual.dtype is weight.dtype
    if kernel is None or not has_one_dtype or not is_contiguous:
        return add_rms_norm_reference(x, residual, weight, eps)
    size = weight.shape[0]
    args = AddRmsNormArgs(
        x=x.data_ptr(),
        residual=residual.data_ptr(),
        weight=weight.data_ptr(),
        rows=x.numel() // size,
        n=size,
        num_threads=torch.get_num_threads(),
        eps=eps,
    )
    kernel(byref(args))
    return x, residual


def add_rms_norm_fp8(
    x: Tensor | None, residual: Tensor, weight: Tensor, eps: float, *, scale: Tensor | None = None
) -> tuple[Fp8Rows, Tensor]:
    """`add_rms_norm` of [num_tokens, hidden], its first result quantized without rounding before.

    `scale` is `quantize_rows`'. The caller must forget `x` and `residual`.
    """
    _check(residual, weight)
    if x is not None and x.shape != residual.shape:
        raise ValueError(f"x is {tuple(x.shape)} but residual {tuple(residual.shape)}")
    is_contiguous = residual.is_contiguous() and (x is None or x.is_contiguous())
    if residual.is_cuda and is_contiguous:
        from kernels.gpu import norm as gpu

        return gpu.add_rms_norm_fp8(x, residual, weight, eps, scale=scale)
    return add_rms_norm_fp8_reference(x, residual, weight, eps, scale=scale)


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


def add_rms_norm_fp8_reference(
    x: Tensor | None, residual: Tensor, weight: Tensor, eps: float, *, scale: Tensor | None = None
) -> tuple[Fp8Rows, Tensor]:
    """`add_rms_norm_fp8` in torch."""
    residual = residual if x is None else x + residual
    normed = rms_norm_reference(residual.float(), weight.float(), eps)
    return quantize_rows_reference(normed, scale), residual


def _check(x: Tensor, weight: Tensor) -> None:
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"weight is {tuple(weight.shape)} but x {tuple(x.shape)}")
