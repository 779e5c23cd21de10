"""`kernels.turning` inside of kernels."""

# What kernels call is compiled with them, whatever types its decorator has.
# pyright: reportGeneralTypeIssues=false, reportAssignmentType=false

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.turning import turned

LARGEST_FLOAT16 = tl.constexpr(65504.0)


@functools.cache
def signs_of(head_dim: int, device: torch.device) -> Tensor:
    """The Hadamard matrix for halves of heads, of 1 and -1: float16 [half, half]. Kernels that make
    it take longer than those that read it. Its address never changes, as graphs hold it."""
    half = head_dim // 2
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("a kernel that turns heads must run once before it's captured")
    rows = torch.cat((torch.eye(half), torch.zeros(half, half)), 1)
    return turned(rows)[:, :half].sign().to(device, torch.float16)


@triton.jit
def load_signs(signs, SIZE: tl.constexpr):
    """`signs_of` heads of 2 * SIZE, from memory."""
    numbers = tl.arange(0, SIZE)
    return tl.load(signs + numbers[:, None] * SIZE + numbers[None, :])


@triton.jit
def turned_rows(x, signs, dtype: tl.constexpr):
    """Halves of heads as rows, [num_rows, half], turned, in float32; `dtype` is what they are made
    of. Types of 16 bits are multiplied as float16, whose fraction is the longer one."""
    if dtype == tl.bfloat16:
        x = tl.clamp(x, -LARGEST_FLOAT16, LARGEST_FLOAT16, propagate_nan=tl.PropagateNan.ALL)
    factor_dtype: tl.constexpr = tl.float32 if dtype == tl.float32 else tl.float16
    # Rows are columns of the product, which needn't be many.
    columns = tl.trans(x.to(factor_dtype))
    product = tl.dot(signs.to(factor_dtype), columns, input_precision="ieee")
    scale: tl.constexpr = x.shape[1] ** -0.5
    return tl.trans(product * scale)
