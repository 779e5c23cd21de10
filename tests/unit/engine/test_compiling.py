"""Which layers stand for all; what is compiled of them is tested on a GPU (tests/gpu)."""

import pytest

from engine.compiling import unlike_layers


@pytest.mark.parametrize(
    ("windows", "layers"),
    [
        ((None,), [0]),
        ((None,) * 4, [0, 1]),
        ((8, None) * 3, [0, 1]),
        ((None, None, None, 8, 8), [0, 1, 3]),
        ((8, 8, 16, 8, None), [0, 1, 2, 4]),
    ],
)
def test_first_layers_and_every_window(windows: tuple[int | None, ...], layers: list[int]) -> None:
    assert unlike_layers(windows) == layers
