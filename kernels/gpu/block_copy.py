"""Copying blocks: a program moves tiles of blocks, 16 bytes a thread and load."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.gpu.launching import launch
from kernels.gpu.sizes import ceil_div

_TILE_WORDS = 4096
_WORDS_PER_VECTOR = tl.constexpr(4)


# The second ids are behind the first ones, at any address.
@triton.jit(
    do_not_specialize=["num_tiles"], do_not_specialize_on_alignment=["source_ids", "target_ids"]
)
def _copy_blocks_kernel(
    source,
    source_ids,
    target,
    target_ids,
    num_vectors,
    tiles_per_block,
    num_tiles,
    TILE: tl.constexpr,
):
    # A multiple of the vector's size, which lets Triton load and store whole vectors.
    num_words = num_vectors * _WORDS_PER_VECTOR
    for tile in range(tl.program_id(0), num_tiles, tl.num_programs(0)):
        copy = tile // tiles_per_block
        words = (tile % tiles_per_block) * TILE + tl.arange(0, TILE)
        mask = words < num_words
        start = tl.load(source_ids + copy).to(tl.int64) * num_words
        values = tl.load(source + start + words, mask=mask, eviction_policy="evict_first")
        start = tl.load(target_ids + copy).to(tl.int64) * num_words
        tl.store(target + start + words, values, mask=mask)


def copy_blocks(
    source: Tensor,
    source_ids: Tensor,
    target: Tensor,
    target_ids: Tensor,
    *,
    max_programs: int | None = None,
) -> None:
    """`kernels.block_copy.copy_blocks` for blocks of whole vectors of 16 bytes."""
    num_words = source.shape[1] // 4
    tiles_per_block = ceil_div(num_words, _TILE_WORDS)
    num_tiles = len(source_ids) * tiles_per_block
    if num_tiles:
        launch(_copy_blocks_kernel, (min(num_tiles, max_programs or num_tiles),))(
            source.view(torch.int32),
            source_ids,
            target.view(torch.int32),
            target_ids,
            num_words // 4,
            tiles_per_block,
            num_tiles,
            TILE=_TILE_WORDS,
            num_warps=8,
        )
