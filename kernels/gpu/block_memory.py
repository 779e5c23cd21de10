"""Memory for copies of a layer's blocks, as kernels want them that read each many times over."""

import torch
from torch import Tensor

from kernels.attention import AttentionBatch
from kernels.gpu.sizes import ceil_div

# At most this much is copied at once; of 16 bits, 131,072 tokens of 8 heads of 128 elements.
_MAX_BYTES = 1 << 29
_MAX_TOKENS = 1 << 17
_WIDEST_BYTES = 2
# Queries a sequence, on average, from which on it is faster than to do without copies.
_MIN_QUERIES = 256


def pays_off(kv_pool: Tensor, batch: AttentionBatch, dtype: torch.dtype) -> bool:
    """Whether to copy a layer's blocks of this batch, and there is memory to do so in `dtype`.

    The memory is taken at the first call, whatever its answer, and kept: the measured largest step
    includes it.
    """
    capacity = _num_bytes(kv_pool) // (kv_pool.shape[2:].numel() * dtype.itemsize)
    capacity = min(capacity, _MAX_TOKENS // kv_pool.shape[4])
    num_blocks = batch.num_seqs * ceil_div(batch.max_kv_len, kv_pool.shape[4])
    return num_blocks <= capacity and batch.num_tokens >= _MIN_QUERIES * batch.num_seqs


_memories: dict[tuple[torch.device, torch.Size], Tensor] = {}


def block_memory(kv_pool: Tensor, dtype: torch.dtype) -> Tensor:
    """Blocks of one layer, [num_blocks, 1, 2, num_kv_heads, block_size, head_dim] of `dtype`.

    One memory for each device and shape, whatever the type; kernels on a stream take turns with it.
    """
    shape = kv_pool.shape[2:]
    _num_bytes(kv_pool)
    memory = _memories[kv_pool.device, shape]
    return memory.view(dtype).view(-1, 1, *shape)[: _MAX_TOKENS // shape[2]]


def _num_bytes(kv_pool: Tensor) -> int:
    """Of the memory, which is there behind the first call."""
    shape = kv_pool.shape[2:]
    block_bytes = shape.numel() * _WIDEST_BYTES
    num_bytes = block_bytes * min(_MAX_BYTES // block_bytes, _MAX_TOKENS // shape[2])
    key = (kv_pool.device, shape)
    if key not in _memories:
        _memories[key] = torch.empty(num_bytes, dtype=torch.uint8, device=kv_pool.device)
    return num_bytes
