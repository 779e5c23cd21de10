"""Batches over a paged pool, and what attention over them must give."""

from typing import Any

import torch
from torch import Tensor

from kernels.attention import AttentionBatch
from kernels.kv_format import UNSCALED, KVScales

FP8_DTYPES = [torch.float8_e4m3fn, torch.float8_e5m2]
FP8_CASES = [{}, {"heads": (9, 3), "head_dim": 80}, {"sliding_window": 5}, {"softcap": 2.0}]
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}


def make_batch(lengths: list[tuple[int, int]], block_size: int) -> AttentionBatch:
    """`lengths` are (num_queries, kv_len); blocks are dealt out in a shuffled order from 1 on."""
    generator = torch.Generator().manual_seed(len(lengths))
    num_blocks = [-(-kv_len // block_size) for _, kv_len in lengths]
    order = torch.randperm(sum(num_blocks), generator=generator) + 1
    tables = torch.zeros(len(lengths), max(num_blocks), dtype=torch.int32)
    slots: list[Tensor] = []
    positions: list[Tensor] = []
    starts = [0]
    taken = 0
    for i, (num_queries, kv_len) in enumerate(lengths):
        tables[i, : num_blocks[i]] = order[taken : taken + num_blocks[i]]
        taken += num_blocks[i]
        position = torch.arange(kv_len - num_queries, kv_len)
        slots.append(tables[i][position // block_size].long() * block_size + position % block_size)
        positions.append(position)
        starts.append(starts[-1] + num_queries)
    return AttentionBatch(
        query_starts=torch.tensor(starts, dtype=torch.int32),
        kv_lens=torch.tensor([kv_len for _, kv_len in lengths], dtype=torch.int32),
        block_tables=tables,
        slots=torch.cat(slots),
        positions=torch.cat(positions),
        max_query_len=max(n for n, _ in lengths),
        max_kv_len=max(n for _, n in lengths),
        num_seqs=len(lengths),
    )


def make_pool(batch: AttentionBatch, heads: int, block_size: int, head_dim: int) -> Tensor:
    """A pool of two layers, NaN wherever no token of the batch lives."""
    num_blocks = int(batch.block_tables.max()) + 1
    pool = torch.full((num_blocks, 2, 2, heads, block_size, head_dim), float("nan"))
    for table, kv_len in zip(batch.block_tables.long(), batch.kv_lens.tolist(), strict=True):
        position = torch.arange(kv_len)
        block, offset = table[position // block_size], position % block_size
        pool[block, :, :, :, offset] = torch.randn(kv_len, 2, 2, heads, head_dim)
    return pool


def attend_naively(
    q: Tensor,
    pool: Tensor,
    layer: int,
    batch: AttentionBatch,
    *,
    scale: float,
    sliding_window: int | None,
    softcap: float | None,
    kv_scales: KVScales = UNSCALED,
) -> Tensor:
    out = torch.empty(q.shape, dtype=torch.float64)
    group = q.shape[1] // pool.shape[3]
    for i in range(batch.num_seqs):
        first, last = batch.query_starts[i : i + 2].tolist()
        kv_len = int(batch.kv_lens[i])
        kv = pool[batch.block_tables[i].long(), layer].double()
        kv = kv.permute(1, 2, 0, 3, 4).flatten(2, 3)[:, :, :kv_len]  # [2, heads, kv, head_dim]
        kv = kv * torch.tensor([kv_scales.k, kv_scales.v]).double().view(2, 1, 1, 1)
        k, v = kv.repeat_interleave(group, dim=1)
        scores = torch.einsum("qhd,hkd->qhk", q[first:last].double(), k) * scale
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        # How far each key lies back, seen from each query.
        distance = torch.arange(kv_len - (last - first), kv_len)[:, None] - torch.arange(kv_len)
        is_seen = (distance >= 0) & (distance < (sliding_window or kv_len))
        scores = scores.masked_fill(~is_seen[:, None], -torch.inf)
        out[first:last] = torch.einsum("qhk,hkd->qhd", scores.softmax(-1), v)
    return out


def check(
    implementation,
    lengths: list[tuple[int, int]],
    *,
    heads: tuple[int, int] = (4, 2),
    block_size: int = 16,
    head_dim: int = 64,
    dtype: torch.dtype = torch.float32,
    kv_dtype: torch.dtype | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
) -> None:
    torch.manual_seed(0)
    batch = make_batch(lengths, block_size)
    pool = make_pool(batch, heads[1], block_size, head_dim).to(kv_dtype or dtype)
    # As a model has it: a view of a fused qkv tensor.
    fused = torch.randn(len(batch.slots), heads[0] + 2, head_dim).to(dtype)
    q = fused[:, : heads[0]]
    options: dict[str, Any] = {
        "scale": head_dim**-0.5,
        "sliding_window": sliding_window,
        "softcap": softcap,
    }
    if kv_dtype is not None:
        options["kv_scales"] = KVScales(k=0.75, v=1.5)
    expected = attend_naively(q, pool, 1, batch, **options)
    actual = implementation(q, pool, 1, batch, **options)
    assert actual.dtype is dtype
    assert actual.is_contiguous()
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(actual.double(), expected, atol=tolerance, rtol=tolerance)


MIXED = [(1, 1), (1, 40), (7, 7), (1, 33), (1, 16), (20, 50), (1, 17), (64, 129)]
