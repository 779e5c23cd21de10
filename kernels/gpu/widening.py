"""Keys and values of 8 bits in the type that matrix instructions take."""

import triton
import triton.language as tl
from triton import knobs

# For which widening in assembly was measured; others leave it to the compiler.
_HEAD_DIM = 128
# With as many warps and columns of a product, Blackwell's datacenter cards get instructions around
# which the compiler can't place assembly.
_WARPS_TOGETHER, _MANY_COLUMNS = 4, 16


def widens_in_assembly(head_dim: int, columns: int, num_warps: int) -> bool:
    """Whether values are widened so, for products of so many columns; never in the interpreter."""
    are_together = num_warps >= _WARPS_TOGETHER and columns >= _MANY_COLUMNS
    return head_dim == _HEAD_DIM and not are_together and not knobs.runtime.interpret


@triton.jit
def widened(values, query, IN_ASSEMBLY: tl.constexpr):
    """`values` in the type of `query`; if `IN_ASSEMBLY` they have 8 bits, and that is float16.

    The compiler would first bring bytes to where the matrix instruction wants them, one by one;
    past assembly it moves nothing, so what moves is wide, and already of 16 bits.
    """
    if IN_ASSEMBLY and values.dtype == tl.float8e5:
        # A float16's upper half.
        values = tl.inline_asm_elementwise(
            "prmt.b32 $0, $2, 0, 0x1404; prmt.b32 $1, $2, 0, 0x3424;",
            "=r,=r,r",
            [values],
            dtype=tl.float16,
            is_pure=False,
            pack=4,
        )
    elif IN_ASSEMBLY:
        values = tl.inline_asm_elementwise(
            "{ .reg .b16 low, high; mov.b32 {low, high}, $2; "
            "cvt.rn.f16x2.e4m3x2 $0, low; cvt.rn.f16x2.e4m3x2 $1, high; }",
            "=r,=r,r",
            [values],
            dtype=tl.float16,
            is_pure=False,
            pack=4,
        )
    return values.to(query.dtype)
