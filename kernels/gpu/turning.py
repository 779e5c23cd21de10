"""`kernels.turning` inside of kernels."""

# What kernels call is compiled with them, whatever types its decorator has.
# pyright: reportGeneralTypeIssues=false, reportAssignmentType=false

import triton
import triton.language as tl

_LARGEST_FLOAT16 = tl.constexpr(65504.0)
# Bit i is whether i, of five bits, has an odd number of ones.
_PARITIES = tl.constexpr(0x96696996)


@triton.jit
def turned_rows(x, dtype: tl.constexpr):
    """Halves of heads as rows, [num_rows, half], turned, in float32; `dtype` is what they are made
    of. Types of 16 bits are multiplied as float16, whose fraction is the longer one."""
    size: tl.constexpr = x.shape[1]
    factor_dtype: tl.constexpr = tl.float32 if dtype == tl.float32 else tl.float16
    if dtype == tl.bfloat16:
        x = tl.clamp(x, -_LARGEST_FLOAT16, _LARGEST_FLOAT16, propagate_nan=tl.PropagateNan.ALL)
    # The matrix has -1 where its row and column, both of up to ten bits, share an odd number of
    # ones.
    shared = tl.arange(0, size)[:, None] & tl.arange(0, size)[None, :]
    shared = (shared ^ (shared >> 5)) & 31
    is_odd = (tl.full([1, 1], _PARITIES, tl.uint32) >> shared.to(tl.uint32)) & 1
    signs = (1.0 - 2.0 * is_odd.to(tl.float32)).to(factor_dtype)
    # Rows are columns of the product, which needn't be many.
    turned = tl.dot(signs, tl.trans(x.to(factor_dtype)), input_precision="ieee")
    scale: tl.constexpr = size**-0.5
    return tl.trans(turned * scale)
