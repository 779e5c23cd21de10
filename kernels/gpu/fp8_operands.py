"""What attention in 8 bits multiplies: queries quantized by head, and values turned.

Hopper's matrix units sum 8-bit numbers along what lies side by side in memory alone. Keys lie so,
by elements of a head; values would have to by tokens. They are turned once a layer, where a
prompt's queries read each of them many times over.
"""

# A launch takes compile options beside the kernel's arguments.
# What kernels call is compiled with them, whatever types its decorator has.
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.attention import QUERY_PARTS, AttentionBatch
from kernels.fp8 import FP8
from kernels.gpu.fp8 import quantize
from kernels.gpu.sizes import ceil_div, next_power_of_2

TOKENS = 128
"""Of a tile of values."""
# Of 8 heads of 128 elements these are 128 MiB.
_MAX_TOKENS = 1 << 17
_HEADS = 8


@triton.jit
def _quantize_heads_kernel(
    q,
    values,
    scales,
    num_heads,
    q_stride,
    head_dim,
    part_stride,
    PARTS: tl.constexpr,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    heads = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    columns = tl.arange(0, DIM)
    is_head = heads < num_heads
    mask = is_head[:, None] & (columns < head_dim)[None, :]
    at = heads[:, None] * head_dim + columns[None, :]
    given = tl.load(q + token * q_stride + at, mask=mask, other=0.0).to(tl.float32)
    _, scale = quantize(given, axis=1)
    given *= 1.0 / scale
    for _ in tl.static_range(PARTS):
        quantized = given.to(tl.float8e4nv)
        tl.store(values + token * num_heads * head_dim + at, quantized, mask=mask)
        given -= quantized.to(tl.float32)
        at += part_stride
    tl.store(scales + token * num_heads + heads[:, None], scale, mask=is_head[:, None])


def quantize_heads(q: Tensor, parts: int = QUERY_PARTS) -> tuple[Tensor, Tensor]:
    """`q` [num_tokens, num_heads, head_dim] as a sum of `parts` tensors of 8 bits, times a scale.

    Returns [parts, num_tokens, num_heads, head_dim] and scales, float32 [num_tokens, num_heads].
    """
    num_tokens, num_heads, head_dim = q.shape
    values = torch.empty((parts, *q.shape), dtype=FP8, device=q.device)
    scales = torch.empty((num_tokens, num_heads), dtype=torch.float32, device=q.device)
    if num_tokens:
        _quantize_heads_kernel[(num_tokens, ceil_div(num_heads, _HEADS))](
            q,
            values,
            scales,
            num_heads,
            q.stride(0),
            head_dim,
            values.stride(0),
            PARTS=parts,
            HEADS=_HEADS,
            DIM=next_power_of_2(head_dim),
            num_warps=4,
        )
    return values, scales


@triton.jit(do_not_specialize=["table_stride", "max_tiles"])
def _turn_values_kernel(
    pool,
    turned,
    kv_lens,
    block_tables,
    table_stride,
    max_tiles,
    block_stride,
    BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    TOKENS: tl.constexpr,
):
    tile = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1)
    seq = tile // max_tiles
    first = (tile % max_tiles) * TOKENS
    kv_len = tl.load(kv_lens + seq)
    if first < kv_len:
        places = tl.arange(0, TOKENS)
        # What place c of 16 holds: 2c, 2c + 1 and 8 more each.
        within = places % 4 // 2 * 8 + places % 16 // 4 * 2 + places % 2
        tokens = first + places // 16 * 16 + within
        is_token = tokens < kv_len
        block = tl.load(
            block_tables + seq * table_stride + tokens // BLOCK_SIZE, mask=is_token, other=0
        ).to(tl.int64)
        columns = tl.arange(0, HEAD_DIM)
        at = block * block_stride + kv_head * BLOCK_SIZE * HEAD_DIM
        at += tokens % BLOCK_SIZE * HEAD_DIM
        # Past the sequence's end there may be anything, NaN included.
        values = tl.load(pool + at[:, None] + columns[None, :], mask=is_token[:, None], other=0)
        target = turned + (tile * tl.num_programs(1) + kv_head) * HEAD_DIM * TOKENS
        tl.store(target + columns[:, None] * TOKENS + places[None, :], tl.trans(values))


def turn_values(kv_pool: Tensor, layer: int, batch: AttentionBatch) -> Tensor:
    """One layer's values of a batch by tiles of tokens, zero past a sequence's end.

    The result is [num_seqs * tiles, num_kv_heads, head_dim, TOKENS], with as many tiles a sequence
    as the longest has, and overwritten by the next call. Tokens of a tile are in `turned_order`.
    `fits` must have said yes.
    """
    num_kv_heads, block_size, head_dim = kv_pool.shape[3:]
    max_tiles = ceil_div(batch.max_kv_len, TOKENS)
    turned = _memory(kv_pool)[: batch.num_seqs * max_tiles]
    # Bytes, whatever numbers they are.
    values = kv_pool.view(torch.uint8)[:, layer, 1]
    _turn_values_kernel[(len(turned), num_kv_heads)](
        values,
        turned.view(torch.uint8),
        batch.kv_lens,
        batch.block_tables,
        batch.block_tables.stride(0),
        max_tiles,
        kv_pool.stride(0),
        BLOCK_SIZE=block_size,
        HEAD_DIM=head_dim,
        TOKENS=TOKENS,
        num_warps=4,
    )
    return turned


def turned_order() -> Tensor:
    """Which of a tile's tokens each place holds, [TOKENS].

    A thread's weights of two times two neighbours, eight apart, as scores leave them, are four
    neighbours in the weighted sum, so that none has to move.
    """
    return torch.arange(TOKENS).view(-1, 2, 4, 2).transpose(1, 2).flatten()


def fits(kv_pool: Tensor, dtype: torch.dtype, batch: AttentionBatch) -> bool:  # noqa: ARG001
    """Whether there is memory to turn a layer's values of this batch.

    It is taken at the first call, whatever its answer, and kept: the measured largest step
    includes it.
    """
    return batch.num_seqs * ceil_div(batch.max_kv_len, TOKENS) <= len(_memory(kv_pool))


_memories: dict[tuple[torch.device, torch.Size], Tensor] = {}


def _memory(kv_pool: Tensor) -> Tensor:
    """For each device and shape; kernels on a stream take turns with it."""
    num_kv_heads, _, head_dim = kv_pool.shape[3:]
    shape = torch.Size((_MAX_TOKENS // TOKENS, num_kv_heads, head_dim, TOKENS))
    key = (kv_pool.device, shape)
    if key not in _memories:
        _memories[key] = torch.empty(shape, dtype=FP8, device=kv_pool.device)
    return _memories[key]
