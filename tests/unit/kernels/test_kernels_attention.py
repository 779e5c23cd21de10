"""Paged attention against a per-sequence loop in float64, over mixed batches."""

from dataclasses import replace

import pytest
import torch
from attention_cases import FP8_CASES, FP8_DTYPES, MIXED, check, make_batch, make_pool

from kernels.attention import AttentionBatch, paged_attention, paged_attention_reference
from kernels.native.library import Operation, native_kernel

IMPLEMENTATIONS = [paged_attention, paged_attention_reference]


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

    @pytest.mark.parametrize("kv_dtype", FP8_DTYPES)
    @pytest.mark.parametrize("case", FP8_CASES, ids=str)
    def test_fp8_pools(self, implementation, dtype, kv_dtype, case):
        check(implementation, MIXED, dtype=dtype, kv_dtype=kv_dtype, **case)

    def test_long_windows(self, implementation, dtype):
        lengths = [(1, 1300), (130, 1100)]
        check(implementation, lengths, heads=(2, 1), dtype=dtype, sliding_window=600)


def test_a_query_that_does_not_fit_the_pool_is_refused():
    batch = make_batch([(1, 4)], 16)
    with pytest.raises(ValueError, match="doesn't fit the pool"):
        paged_attention(torch.zeros(1, 3, 64), torch.zeros(2, 1, 2, 2, 16, 64), 0, batch, scale=1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sliding_window", [None, 300])
class TestBatchInvariance:
    """A query's result is the same to the bit in any batch, cut of the prompt or thread count."""

    LENGTH, BLOCK_SIZE, HEADS, HEAD_DIM = 1203, 16, (6, 2), 64

    @pytest.fixture
    def whole(self, dtype, sliding_window):
        """The whole prompt in one chunk: batch, pool, queries and result."""
        torch.manual_seed(0)
        batch = make_batch([(self.LENGTH, self.LENGTH)], self.BLOCK_SIZE)
        pool = make_pool(batch, self.HEADS[1], self.BLOCK_SIZE, self.HEAD_DIM).to(dtype)
        q = torch.randn(self.LENGTH, self.HEADS[0], self.HEAD_DIM).to(dtype)
        out = paged_attention(q, pool, 0, batch, scale=0.125, sliding_window=sliding_window)
        return batch, pool, q, out

    def attend(self, whole, ranges: list[tuple[int, int]], sliding_window: int | None) -> None:
        """Attend to position ranges of the prompt as if each were another sequence's chunk."""
        batch, pool, q, expected = whole
        starts = torch.tensor([0, *(last - first for first, last in ranges)]).cumsum(0)
        part = AttentionBatch(
            query_starts=starts.int(),
            kv_lens=torch.tensor([last for _, last in ranges], dtype=torch.int32),
            block_tables=batch.block_tables.repeat(len(ranges), 1),
            slots=torch.cat([batch.slots[first:last] for first, last in ranges]),
            positions=torch.cat([batch.positions[first:last] for first, last in ranges]),
            max_query_len=max(last - first for first, last in ranges),
            max_kv_len=max(last for _, last in ranges),
            num_seqs=len(ranges),
        )
        queries = torch.cat([q[first:last] for first, last in ranges])
        actual = paged_attention(queries, pool, 0, part, scale=0.125, sliding_window=sliding_window)
        assert torch.equal(actual, torch.cat([expected[first:last] for first, last in ranges]))

    @pytest.mark.parametrize("num_threads", [1, 2, 3])
    def test_decode_rows_and_chunks(self, whole, sliding_window, num_threads):
        if native_kernel(Operation.PAGED_ATTENTION, whole[2]) is None:
            pytest.skip("torch's own attention doesn't promise it")
        previous = torch.get_num_threads()
        torch.set_num_threads(num_threads)
        try:
            last = self.LENGTH
            self.attend(whole, [(last - 1, last)], sliding_window)
            self.attend(whole, [(600, 601)], sliding_window)
            self.attend(whole, [(512, last)], sliding_window)
            self.attend(whole, [(i, i + 1) for i in range(0, last, 97)], sliding_window)
            self.attend(whole, [(0, 1), (700, 700 + 127), (1, 65), (127, 129)], sliding_window)
        finally:
            torch.set_num_threads(previous)


def test_the_last_tokens_are_a_batch_of_their_own():
    torch.manual_seed(0)
    batch = make_batch([(5, 9), (1, 20), (3, 3)], 4)
    pool, q = make_pool(batch, 2, 4, 16), torch.randn(9, 4, 16)
    whole = paged_attention(q, pool, 0, batch, scale=0.25)
    last = batch.last_tokens(32)
    assert last.rows.tolist() == [4, 5, 8]
    assert last.batch.slots.tolist() == batch.slots[[4, 5, 8]].tolist()
    assert last.batch.positions.tolist() == [8, 19, 2]
    alone = paged_attention(q[last.rows], pool, 0, last.batch, scale=0.25)
    torch.testing.assert_close(alone, whole[last.rows])


def test_sequences_without_tokens_have_some_last_row():
    """As a captured graph's padded ones, at its end or before anything is written."""
    batch = make_batch([(2, 2), (3, 3)], 4)
    for starts, rows in (([0, 2, 2], [1, 1]), ([0, 0, 0], [0, 0])):
        padded = replace(batch, query_starts=torch.tensor(starts, dtype=torch.int32))
        assert padded.last_tokens(4).rows.tolist() == rows


def test_a_batch_of_wrong_types_is_refused():
    batch = make_batch([(1, 4)], 16)
    with pytest.raises(ValueError, match="int32"):
        replace(batch, block_tables=batch.block_tables.long())
