"""The random numbers themselves: pinned values, and no pattern along seeds or positions."""

import numpy as np
import pytest

from engine.sampler.randomness import row_key, uniforms

PINNED = [0.4538496701824696, 0.8878993415613692]


def test_values_are_pinned() -> None:
    """A change here would break every request that migrates between versions."""
    key = row_key(1234, request_id="any", root_seed=0)
    values = uniforms(np.array([key, key], dtype=np.uint64), np.array([0, 1]))
    assert values.tolist() == PINNED


def test_a_row_key_without_seed_depends_on_request_and_root_seed() -> None:
    keys = {
        row_key(None, request_id="a", root_seed=0),
        row_key(None, request_id="b", root_seed=0),
        row_key(None, request_id="a", root_seed=1),
        row_key(0, request_id="a", root_seed=0),
    }
    assert len(keys) == 4


@pytest.mark.parametrize("axis", ["seeds", "positions"])
def test_numbers_are_uniform_and_uncorrelated(axis: str) -> None:
    count = 100_000
    if axis == "seeds":
        keys = [row_key(seed, request_id="", root_seed=0) for seed in range(count)]
        values = uniforms(np.array(keys, dtype=np.uint64), np.zeros(count, dtype=np.int64))
    else:
        key = np.full(count, row_key(7, request_id="", root_seed=0), dtype=np.uint64)
        values = uniforms(key, np.arange(count))
    assert values.min() >= 0.0
    assert values.max() < 1.0
    observed = np.histogram(values, bins=100, range=(0, 1))[0]
    assert ((observed - count / 100) ** 2 / (count / 100)).sum() < 99 + 4 * (2 * 99) ** 0.5
    assert abs(np.corrcoef(values[:-1], values[1:])[0, 1]) < 4 / count**0.5
