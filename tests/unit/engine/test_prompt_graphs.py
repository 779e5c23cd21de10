"""The ladder of steps with prompts; captured ones themselves are tested on a GPU (tests/gpu)."""

import pytest

from engine.prompt_graphs import graph_shapes


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
