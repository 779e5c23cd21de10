"""Paged attention against a per-query loop in float64, over mixed batches."""

import pytest
import torch
from torch import Tensor

from kernels.attention import AttentionBatch, paged_attention, paged_attention_reference

IMPLEMENTATIONS = [paged_attention, paged_attention_reference]
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
    for table, kv_len in zip(batch.block_tables.tolist(), batch.kv_lens.tolist(), strict=True):
        for position in range(kv_len):
            block, offset = table[position // block_size], position % block_size
            pool[block, :, :, :, offset] = torch.randn(2, 2, heads, head_dim)
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
) -> Tensor:
    out = torch.empty(q.shape, dtype=torch.float64)
    group = q.shape[1] // pool.shape[3]
    for i in range(batch.num_seqs):
        first, last = batch.query_starts[i : i + 2].tolist()
        kv_len = int(batch.kv_lens[i])
        kv = pool[batch.block_tables[i].long(), layer].double()
        kv = kv.permute(1, 2, 0, 3, 4).flatten(2, 3)  # [2, heads, kv, head_dim]
        for row in range(first, last):
            end = kv_len - (last - row) + 1
            begin = max(0, end - sliding_window) if sliding_window else 0
            k, v = kv[:, :, begin:end].repeat_interleave(group, dim=1)
            scores = torch.einsum("hd,hkd->hk", q[row].double(), k) * scale
            if softcap:
                scores = softcap * torch.tanh(scores / softcap)
            out[row] = torch.einsum("hk,hkd->hd", scores.softmax(-1), v)
    return out


def check(
    implementation,
    lengths: list[tuple[int, int]],
    *,
    heads: tuple[int, int] = (4, 2),
    block_size: int = 16,
    head_dim: int = 64,
    dtype: torch.dtype = torch.float32,
    sliding_window: int | None = None,
    softcap: float | None = None,
) -> None:
    torch.manual_seed(0)
    batch = make_batch(lengths, block_size)
    pool = make_pool(batch, heads[1], block_size, head_dim).to(dtype)
    # As a model has it: a view of a fused qkv tensor.
    fused = torch.randn(len(batch.slots), heads[0] + 2, head_dim).to(dtype)
    q = fused[:, : heads[0]]
    options = {"scale": head_dim**-0.5, "sliding_window": sliding_window, "softcap": softcap}
    expected = attend_naively(q, pool, 1, batch, **options)
    actual = implementation(q, pool, 1, batch, **options)
    assert actual.dtype is dtype
    assert actual.is_contiguous()
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(actual.double(), expected, atol=tolerance, rtol=tolerance)


MIXED = [(1, 1), (1, 40), (7, 7), (1, 33), (1, 16), (20, 50), (1, 17), (64, 129)]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
class TestPagedAttention:
    @pytest.mark.parametrize("heads", [(9, 3), (4, 4), (8, 1), (14, 2)])
    def test_head_groups(self, implementation, dtype, heads):
        check(implementation, MIXED, heads=heads, dtype=dtype)

    @pytest.mark.parametrize("head_dim", [32, 80, 96, 128, 256])
    def test_head_dims(self, implementation, dtype, head_dim):
        check(implementation, MIXED, head_dim=head_dim, dtype=dtype)

    @pytest.mark.parametrize("block_size", [1, 5, 32, 48, 128])
    def test_block_sizes(self, implementation, dtype, block_size):
        check(implementation, MIXED, block_size=block_size, dtype=dtype)

    @pytest.mark.parametrize("sliding_window", [1, 5, 16, 64, 1000])
    def test_sliding_windows(self, implementation, dtype, sliding_window):
        check(implementation, MIXED, sliding_window=sliding_window, dtype=dtype)

    def test_softcap(self, implementation, dtype):
        check(implementation, MIXED, softcap=2.0, dtype=dtype)

    def test_long_contexts(self, implementation, dtype):
        check(implementation, [(1, 1300), (3, 700), (130, 1100)], heads=(3, 1), dtype=dtype)

    def test_long_windows(self, implementation, dtype):
        lengths = [(1, 1300), (130, 1100)]
        check(implementation, lengths, heads=(2, 1), dtype=dtype, sliding_window=600)


def test_a_query_that_does_not_fit_the_pool_is_refused():
    batch = make_batch([(1, 4)], 16)
    with pytest.raises(ValueError, match="doesn't fit the pool"):
        paged_attention(torch.zeros(1, 3, 64), torch.zeros(2, 1, 2, 2, 16, 64), 0, batch, scale=1.0)
