"""The ladder of steps with prompts; captured ones themselves are tested on a GPU (tests/gpu)."""

import numpy as np
import pytest

from engine.batch import StepArrays
from engine.prompt_graphs import graph_shapes, num_attended


@pytest.mark.parametrize("max_num_batched_tokens", [1, 16, 100, 1024, 8192])
@pytest.mark.parametrize("max_num_seqs", [1, 8, 16, 17, 200, 256])
def test_shapes_have_room_for_what_a_step_may_hold(
    max_num_seqs: int, max_num_batched_tokens: int
) -> None:
    shapes = graph_shapes(max_num_seqs, max_num_batched_tokens)
    assert sum(shapes[0]) == max(sum(shape) for shape in shapes), "the largest comes first"
    assert len(set(shapes)) == len(shapes)
    singles = {num_singles for num_singles, _ in shapes}
    assert 0 in singles
    assert all(num_singles % 16 == 0 for num_singles in singles)
    for num_singles in range(min(max_num_seqs, max_num_batched_tokens - 1) + 1):
        padded = min(num for num in singles if num >= num_singles)
        # As many as a step of 2,048 tokens has beside them, however they're padded.
        num_tokens = min(max_num_batched_tokens, 2048) - num_singles
        if padded < 128:
            num_tokens = min(num_tokens, 2048 - padded)  # the scheduler leaves the rest out
        assert any(num == padded and tokens >= num_tokens for num, tokens in shapes)


def test_whole_steps_fill_the_tiles_of_products() -> None:
    assert {sum(shape) % 64 for shape in graph_shapes(256, 8192)} == {0}


def test_a_small_worker_captures_little() -> None:
    assert graph_shapes(8, 64) == [(16, 112), (0, 64), (16, 48)]


@pytest.mark.parametrize(("counts", "kv_lens"), [([1, 1, 3, 5], [900, 7, 10, 40]), ([70], [70])])
def test_attended_tokens_are_those_of_prompts(counts: list[int], kv_lens: list[int]) -> None:
    nothing = np.zeros(0, dtype=np.int64)
    arrays = StepArrays(
        token_ids=nothing,
        sources=None,
        query_starts=np.cumsum([0, *counts], dtype=np.int32),
        kv_lens=np.array(kv_lens, dtype=np.int32),
        block_tables=np.zeros((len(counts), 1), dtype=np.int32),
        slots=nothing,
        positions=nothing,
        max_query_len=max(counts),
        max_kv_len=max(kv_lens),
        num_decodes=counts.count(1),
        samples=nothing,
        sample_rows=nothing,
        sample_positions=nothing,
    )
    longer = (pair for pair in zip(counts, kv_lens, strict=True) if pair[0] > 1)
    assert num_attended(arrays) == sum(count * kv_len for count, kv_len in longer)
