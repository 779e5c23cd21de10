"""A layer's blocks of 8 bits, widened for kernels that multiply 16.

A prompt's queries read each of its tokens many times over: widened once, they are read as they
are. The layer's blocks of all sequences lie one after the other in a pool of this layer alone.
Keys may be turned back (`kernels.turning`), for queries that aren't turned.
"""

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.attention import AttentionBatch
from kernels.gpu.block_memory import block_memory
from kernels.gpu.launching import launch
from kernels.gpu.sizes import ceil_div
from kernels.gpu.turning import load_matrix, matrix_of, turned_many_rows

_TILE = 4096
_TURNED_TILE = 8192


@triton.jit(do_not_specialize=["table_stride", "max_blocks", "block_size"])
def _widen_blocks_kernel(
    pool,
    widened,
    kv_lens,
    block_tables,
    matrix,
    table_stride,
    max_blocks,
    block_size,
    block_stride,
    size,
    TILE: tl.constexpr,
    TURNED_SIZE: tl.constexpr,
):
    target = tl.program_id(0).to(tl.int64)
    seq = target // max_blocks
    index = target % max_blocks
    if index * block_size < tl.load(kv_lens + seq):
        block = tl.load(block_tables + seq * table_stride + index).to(tl.int64)
        first = tl.program_id(1) * TILE
        source, result = pool + block * block_stride + first, widened + target * size + first
        dtype: tl.constexpr = widened.dtype.element_ty
        if TURNED_SIZE:
            rows = tl.arange(0, TILE // TURNED_SIZE)
            elements = rows[:, None] * TURNED_SIZE + tl.arange(0, TURNED_SIZE)[None, :]
        else:
            elements = tl.arange(0, TILE)
        mask = first + elements < size
        stored = tl.load(source + elements, mask=mask, other=0.0)
        values = stored.to(dtype)
        # One is for the compiler, the other for each tile. Keys come first.
        if TURNED_SIZE:  # noqa: SIM102
            if first < size // 2:
                signs = load_matrix(matrix, TURNED_SIZE)
                turned = turned_many_rows(stored.to(tl.float16), signs)
                values = tl.where(first + elements < size // 2, turned.to(dtype), values)
        tl.store(result + elements, values, mask=mask)


def widen_blocks(
    kv_pool: Tensor,
    layer: int,
    batch: AttentionBatch,
    dtype: torch.dtype,
    *,
    turns_back: bool = False,
) -> tuple[Tensor, AttentionBatch]:
    """One layer of the batch's blocks in `dtype`, and the batch over them; `turns_back` is for
    turned keys.

    The result is [num_blocks, 1, 2, num_kv_heads, block_size, head_dim], not multiplied with any
    scales, and overwritten by the next copy of blocks. `pays_off` must have said yes.
    """
    widened = block_memory(kv_pool, dtype)
    block_size = kv_pool.shape[4]
    size = kv_pool[0, layer].numel()
    max_blocks = ceil_div(batch.max_kv_len, block_size)
    num_blocks = batch.num_seqs * max_blocks
    tile = _TURNED_TILE if turns_back else _TILE
    launch(_widen_blocks_kernel, (num_blocks, ceil_div(size, tile)))(
        kv_pool[:, layer],
        widened,
        batch.kv_lens,
        batch.block_tables,
        matrix_of(kv_pool.shape[5], kv_pool.device) if turns_back else None,
        batch.block_tables.stride(0),
        max_blocks,
        block_size,
        kv_pool.stride(0),
        size,
        TILE=tile,
        TURNED_SIZE=kv_pool.shape[5] // 2 if turns_back else 0,
        num_warps=8,
    )
    ids = torch.arange(num_blocks, dtype=torch.int32, device=kv_pool.device)
    return widened[:num_blocks], replace(batch, block_tables=ids.view(batch.num_seqs, max_blocks))
