"""`kernels.turning` inside of kernels."""

# What kernels call is compiled with them, whatever types its decorator has.
# pyright: reportGeneralTypeIssues=false, reportAssignmentType=false

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.gpu.saturating import to_float16
from kernels.turning import turned


@functools.cache
def matrix_of(head_dim: int, device: torch.device) -> Tensor:
    """The Hadamard matrix for halves of heads, float16 [half, half], but for `_missing_factor`.
    Kernels that make it take longer than those that read it. Its address never changes, as graphs
    hold it."""
    half = head_dim // 2
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("a kernel that turns heads must run once before it's captured")
    rows = torch.cat((torch.eye(half), torch.zeros(half, half)), 1)
    return (turned(rows)[:, :half] / _missing_factor(half)).to(device, torch.float16)


def _missing_factor(half: int) -> float:
    """Without it, all elements of a matrix are powers of two."""
    return 1.0 if half.bit_length() % 2 else 2.0**-0.5


_missing_factor_of = triton.constexpr_function(_missing_factor)


@triton.jit
def load_matrix(matrix, SIZE: tl.constexpr):
    """`matrix_of` heads of 2 * SIZE, from memory."""
    numbers = tl.arange(0, SIZE)
    return tl.load(matrix + numbers[:, None] * SIZE + numbers[None, :])


@triton.jit
def turned_rows(x, matrix, dtype: tl.constexpr):
    """Halves of heads as rows, [num_rows, half], turned, in float32; `dtype` is what they are made
    of. Types of 16 bits are multiplied as float16, whose fraction is the longer one."""
    if dtype == tl.float32:
        matrix = matrix.to(tl.float32)
    else:
        x = to_float16(x)
    # Rows are columns of the product, which needn't be many.
    product = tl.trans(tl.dot(matrix, tl.trans(x), input_precision="ieee"))
    factor: tl.constexpr = _missing_factor_of(x.shape[1])
    return product if factor == 1.0 else product * factor


@triton.jit
def turned_many_rows(x, matrix):
    """`turned_rows` of float16 numbers: faster for 64 and more, but it takes more registers where
    rows are rotated, too."""
    factor: tl.constexpr = _missing_factor_of(x.shape[1])
    product = tl.dot(x, matrix)
    return product if factor == 1.0 else product * factor
