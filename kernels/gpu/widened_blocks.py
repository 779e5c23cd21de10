"""A layer's blocks of 8 bits, widened for kernels that multiply 16.

A prompt's queries read each of its tokens many times over: widened once, they are read as they
are. The layer's blocks of all sequences lie one after the other in a pool of this layer alone.
"""

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.attention import AttentionBatch
from kernels.gpu.launching import launch
from kernels.gpu.sizes import ceil_div

_TILE = 4096
# At most this much is widened at once; 131,072 tokens of 8 heads of 128 elements.
_MAX_BYTES = 1 << 29
_MAX_TOKENS = 1 << 17
# Queries a sequence, on average, from which on it is faster than to widen while attending.
_MIN_QUERIES = 256


@triton.jit(do_not_specialize=["table_stride", "max_blocks", "block_size"])
def _widen_blocks_kernel(
    pool,
    widened,
    kv_lens,
    block_tables,
    table_stride,
    max_blocks,
    block_size,
    block_stride,
    size,
    TILE: tl.constexpr,
):
    target = tl.program_id(0).to(tl.int64)
    seq = target // max_blocks
    index = target % max_blocks
    if index * block_size < tl.load(kv_lens + seq):
        block = tl.load(block_tables + seq * table_stride + index).to(tl.int64)
        elements = tl.program_id(1) * TILE + tl.arange(0, TILE)
        mask = elements < size
        values = tl.load(pool + block * block_stride + elements, mask=mask)
        tl.store(widened + target * size + elements, values.to(widened.dtype.element_ty), mask=mask)


def pays_off(q: Tensor, kv_pool: Tensor, batch: AttentionBatch) -> bool:
    """Whether to widen a layer's blocks of this batch, and there is memory to do so.

    The memory is taken at the first call, whatever its answer, and kept: the measured largest step
    includes it.
    """
    widened = _memory(kv_pool, q.dtype)
    num_blocks = batch.num_seqs * ceil_div(batch.max_kv_len, kv_pool.shape[4])
    return num_blocks <= len(widened) and len(q) >= _MIN_QUERIES * batch.num_seqs


def widen_blocks(
    kv_pool: Tensor, layer: int, batch: AttentionBatch, dtype: torch.dtype
) -> tuple[Tensor, AttentionBatch]:
    """One layer of the batch's blocks in `dtype`, and the batch over them.

    The result is [num_blocks, 1, 2, num_kv_heads, block_size, head_dim], not multiplied with any
    scales, and overwritten by the next call. `pays_off` must have said yes.
    """
    widened = _memory(kv_pool, dtype)
    block_size = kv_pool.shape[4]
    size = kv_pool[0, layer].numel()
    max_blocks = ceil_div(batch.max_kv_len, block_size)
    num_blocks = batch.num_seqs * max_blocks
    launch(_widen_blocks_kernel, (num_blocks, ceil_div(size, _TILE)))(
        kv_pool[:, layer],
        widened,
        batch.kv_lens,
        batch.block_tables,
        batch.block_tables.stride(0),
        max_blocks,
        block_size,
        kv_pool.stride(0),
        size,
        TILE=_TILE,
        num_warps=8,
    )
    ids = torch.arange(num_blocks, dtype=torch.int32, device=kv_pool.device)
    return widened[:num_blocks], replace(batch, block_tables=ids.view(batch.num_seqs, max_blocks))


_memories: dict[tuple[torch.device, torch.dtype, torch.Size], Tensor] = {}


def _memory(kv_pool: Tensor, dtype: torch.dtype) -> Tensor:
    """Blocks of one layer in `dtype`, one for each device and shape; kernels on a stream take
    turns with them."""
    shape = kv_pool.shape[2:]
    key = (kv_pool.device, dtype, shape)
    if key not in _memories:
        block_bytes = shape.numel() * dtype.itemsize
        num_blocks = min(_MAX_BYTES // block_bytes, _MAX_TOKENS // shape[2])
        _memories[key] = torch.empty((num_blocks, 1, *shape), dtype=dtype, device=kv_pool.device)
    return _memories[key]
