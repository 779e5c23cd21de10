"""What decode attention asks for while its predecessor ends."""

# What kernels call is compiled with them, whatever types its decorator has.
# pyright: reportGeneralTypeIssues=false

import triton
import triton.language as tl

from kernels.gpu.dependent_launch import LINE_BITS, prefetch_to_l2


@triton.jit
def prefetch_tiles(
    head_pool, table, tile, first, end, block_stride, kv_stride,
    TILES: tl.constexpr, TOKENS: tl.constexpr, BLOCK_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """Of one head's tokens from `first` to `end`, those in so many tiles from `tile` on."""
    line: tl.constexpr = LINE_BITS // head_pool.dtype.element_ty.primitive_bitwidth
    for ahead in tl.static_range(TILES):
        tokens = (tile + ahead) * TOKENS + tl.arange(0, TOKENS)
        tokens = tl.minimum(tl.maximum(tokens, first), end - 1)
        block = tl.load(table + tokens // BLOCK_SIZE).to(tl.int64)
        at = block * block_stride + (tokens % BLOCK_SIZE) * HEAD_DIM
        for column in tl.static_range(0, HEAD_DIM, line):
            prefetch_to_l2(head_pool + at + column)
            prefetch_to_l2(head_pool + at + column + kv_stride)


@triton.jit
def prefetch_norms(q_weight, k_weight, HEAD_DIM: tl.constexpr, PDL: tl.constexpr):
    """Weights of norms, if there are any: a step reads each once, so no cache holds them."""
    if PDL and q_weight is not None:
        columns = tl.arange(0, HEAD_DIM)
        prefetch_to_l2(q_weight + columns)
        prefetch_to_l2(k_weight + columns)
