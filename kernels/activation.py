"""The gated activation of Llama-like feed-forward layers."""

from ctypes import byref

import torch
from torch import Tensor

from kernels.fp8 import Fp8Rows, quantize_rows_reference
from kernels.native.arguments import SiluAndMulArgs
from kernels.native.library import Operation, native_kernel


def silu_and_mul(gate_up: Tensor) -> Tensor:
    """Return `silu(gate) * up` for `gate_up` [num_tokens, 2 * intermediate], gate half first."""
    num_tokens, size = gate_up.shape
    if size % 2:
        raise ValueError(f"gate_up has an odd last dimension: {tuple(gate_up.shape)}")
    if gate_up.is_cuda and gate_up.is_contiguous():
        from kernels.gpu import activation as gpu

        return gpu.silu_and_mul(gate_up)
    kernel = native_kernel(Operation.SILU_AND_MUL, gate_up)
    if kernel is None or not gate_up.is_contiguous():
        return silu_and_mul_reference(gate_up)
    out = torch.empty((num_tokens, size // 2), dtype=gate_up.dtype)
    args = SiluAndMulArgs(
        gate_up=gate_up.data_ptr(),
        out=out.data_ptr(),
        rows=num_tokens,
        n=size // 2,
        num_threads=torch.get_num_threads(),
    )
    kernel(byref(args))
    return out


def silu_and_mul_fp8(
    gate_up: Tensor,
    *,
    scale: Tensor | None = None,
    scales: tuple[Tensor, Tensor] | None = None,
) -> Fp8Rows:
    """`silu_and_mul`, quantized without rounding before; `scale` is `quantize_rows`'.

    With `scales`, float32 [num_tokens] and [2 * intermediate], `gate_up` still lacks those of its
    rows and columns.
    """
    if gate_up.shape[1] % 2:
        raise ValueError(f"gate_up has an odd last dimension: {tuple(gate_up.shape)}")
    if gate_up.is_cuda and gate_up.is_contiguous():
        from kernels.gpu import activation as gpu

        return gpu.silu_and_mul_fp8(gate_up, scale=scale, scales=scales)
    return silu_and_mul_fp8_reference(gate_up, scale=scale, scales=scales)


def silu_and_mul_reference(gate_up: Tensor) -> Tensor:
    """`silu_and_mul` in torch."""
    gate, up = gate_up.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate).mul_(up)


def silu_and_mul_fp8_reference(
    gate_up: Tensor,
    *,
    scale: Tensor | None = None,
    scales: tuple[Tensor, Tensor] | None = None,
) -> Fp8Rows:
    """`silu_and_mul_fp8` in torch."""
    gate_up = gate_up.float()
    if scales is not None:
        row_scales, column_scales = scales
        gate_up = gate_up * row_scales[:, None] * column_scales
    return quantize_rows_reference(silu_and_mul_reference(gate_up), scale)
