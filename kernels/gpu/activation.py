"""The gated activation: reads both halves once, writes their product."""

# A launch takes compile options beside the kernel's arguments.
# pyright: reportCallIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.gpu.dependent_launch import (
    launch_options,
    let_successor_start,
    wait_for_predecessor,
)
from kernels.gpu.sizes import ceil_div

_BLOCK = 1024


@triton.jit
def _silu_and_mul_kernel(gate_up, out, size, BLOCK: tl.constexpr, PDL: tl.constexpr):
    wait_for_predecessor(PDL)
    let_successor_start(PDL)
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < size
    start = gate_up + row * 2 * size + columns
    gate = tl.load(start, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(start + size, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + row * size + columns, gate * tl.sigmoid(gate) * up, mask=mask)


def silu_and_mul(gate_up: Tensor) -> Tensor:
    """`kernels.activation.silu_and_mul` for a contiguous tensor."""
    num_tokens, size = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty((num_tokens, size), dtype=gate_up.dtype, device=gate_up.device)
    if num_tokens:
        _silu_and_mul_kernel[(num_tokens, ceil_div(size, _BLOCK))](
            gate_up,
            out,
            size,
            BLOCK=_BLOCK,
            num_warps=4,
            **launch_options(gate_up.device),
        )
    return out
