"""A layer's keys and values of a batch, each sequence's in one piece, for kernels that know no
blocks."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.attention import AttentionBatch
from kernels.gpu.block_memory import block_memory
from kernels.gpu.launching import launch
from kernels.gpu.sizes import ceil_div

_TILE = 4096
# Kernels multiply whole tiles: what they read behind a sequence's end has weight 0, and must be a
# number. FlashAttention 3's tiles have up to 224 tokens (fa3-fwd 0.0.3).
_MARGIN = 256
# Blocks are copied as they are, so a kernel serves all types of one size.
_BITS = {1: torch.uint8, 2: torch.int16}


@triton.jit(do_not_specialize=["table_stride", "max_blocks"])
def _gather_blocks_kernel(
    pool,
    gathered,
    kv_lens,
    block_tables,
    table_stride,
    max_blocks,
    block_stride,
    BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    NUM_RUNS: tl.constexpr,
    MARGIN: tl.constexpr,
    TILE: tl.constexpr,
):
    # A run is what a block has of one head's keys, or values.
    run_size: tl.constexpr = BLOCK_SIZE * HEAD_DIM
    target = tl.program_id(0).to(tl.int64)
    seq = target // max_blocks
    index = target % max_blocks
    kv_len = tl.load(kv_lens + seq)
    if index * BLOCK_SIZE < kv_len + MARGIN:
        block = tl.load(block_tables + seq * table_stride + index).to(tl.int64)
        elements = tl.program_id(1) * TILE + tl.arange(0, TILE)
        run, at = elements // run_size, elements % run_size
        is_in_block = elements < NUM_RUNS * run_size
        # Not by the token of each element: so the compiler sees that 16 bytes are in together.
        is_in_sequence = at < (kv_len - index * BLOCK_SIZE) * HEAD_DIM
        values = tl.load(
            pool + block * block_stride + elements, mask=is_in_block & is_in_sequence, other=0
        )
        first = (seq * NUM_RUNS + run) * (max_blocks * run_size) + index * run_size
        tl.store(gathered + first + at, values, mask=is_in_block)


def gather_blocks(kv_pool: Tensor, layer: int, batch: AttentionBatch) -> tuple[Tensor, Tensor]:
    """One layer's keys and values of the batch, as they are in the pool; overwritten by the next
    copy of blocks. `pays_off` must have said yes.

    Each is [num_seqs, max_kv_len or more, num_kv_heads, head_dim], a head's tokens adjacent. Up to
    256 tokens behind a sequence's are 0, and what follows them is anything.
    """
    num_kv_heads, block_size, head_dim = kv_pool.shape[3:]
    bits = _BITS[kv_pool.element_size()]
    max_blocks = ceil_div(batch.max_kv_len, block_size)
    gathered = block_memory(kv_pool, kv_pool.dtype)[: batch.num_seqs * max_blocks]
    num_runs = 2 * num_kv_heads
    num_tiles = ceil_div(num_runs * block_size * head_dim, _TILE)
    launch(_gather_blocks_kernel, (len(gathered), num_tiles))(
        kv_pool[:, layer].view(bits),
        gathered.view(bits),
        batch.kv_lens,
        batch.block_tables,
        batch.block_tables.stride(0),
        max_blocks,
        kv_pool.stride(0),
        BLOCK_SIZE=block_size,
        HEAD_DIM=head_dim,
        NUM_RUNS=num_runs,
        MARGIN=_MARGIN,
        TILE=_TILE,
        num_warps=8,
    )
    shape = (batch.num_seqs, 2, num_kv_heads, max_blocks * block_size, head_dim)
    k, v = gathered.view(shape).transpose(2, 3).unbind(1)
    return k, v
