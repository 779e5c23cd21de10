"""Which layers stand for all; what is compiled of them is tested on a GPU (tests/gpu)."""

import pytest

from engine.compiling import unlike_layers


@pytest.mark.parametrize(
    ("windows", "layers"),
    [
        ((None,), [0]),
        ((None,) * 4, [0, 3]),
        ((8, None) * 3, [0, 1, 5]),
        ((None, None, None, 8, 8), [0, 3, 4]),
        ((8, 8, 16, 8, None), [0, 2, 4]),
    ],
)
def test_the_first_with_every_window_and_the_last(
    windows: tuple[int | None, ...], layers: list[int]
) -> None:
    assert unlike_layers(windows) == layers
