"""The ladder of batch sizes; captured steps themselves are tested on a GPU (tests/gpu)."""

import pytest

from engine.decode_graphs import graph_sizes


@pytest.mark.parametrize("max_num_seqs", [1, 2, 3, 7, 8, 9, 16, 100, 256])
def test_every_batch_has_a_size_near_it(max_num_seqs: int) -> None:
    sizes = graph_sizes(max_num_seqs)
    assert sizes == sorted(set(sizes))
    assert sizes[-1] == max_num_seqs
    for batch in range(1, max_num_seqs + 1):
        padded = next(size for size in sizes if size >= batch)
        assert padded - batch < 8
        assert padded < 2 * batch or batch == 1
