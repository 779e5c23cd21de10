"""Workers of one stack share a card."""

import pytest

from cli.gpu_memory import gpu_memory_share


@pytest.mark.parametrize(
    ("num_workers", "share"), [(1, 0.9), (2, 0.45), (3, 0.3), (4, 0.225), (7, 0.128)]
)
def test_share(num_workers: int, share: float) -> None:
    assert gpu_memory_share(0.9, num_workers) == pytest.approx(share)
    assert num_workers * gpu_memory_share(0.9, num_workers) <= 0.9 + 1e-9
