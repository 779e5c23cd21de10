"""What Hopper's kernels ask of a multiprocessor, and which products they take."""

import pytest
import torch

pytest.importorskip("triton")
from kernels.gpu import linear_choice
from kernels.gpu.hopper.linear_tiles import (
    LOADING_REGISTERS,
    HopperTile,
    tile_for,
    tile_for_16_bits,
    token_counts,
)

REGISTERS = 65536
SHARED_BYTES = 227 << 10
# What a warpgroup stores through, and a program's barriers.
STORED_BYTES, BARRIER_BYTES = 8 << 10, 1 << 10
SHAPES = [(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336), (960, 576)]


@pytest.mark.parametrize("warpgroups", [1, 2, 3])
@pytest.mark.parametrize("programs", [1, 2])
def test_registers_that_are_handed_on_were_there(warpgroups: int, programs: int) -> None:
    """A warpgroup that asks for more than there are waits for ever."""
    tile = HopperTile(warpgroups=warpgroups, programs=programs)
    assert 128 * (warpgroups + 1) * tile.registers * programs <= REGISTERS
    pool = tile.registers * (warpgroups + 1)
    assert warpgroups * tile.multiplying_registers + LOADING_REGISTERS <= pool
    assert tile.registers <= tile.multiplying_registers <= 240
    assert tile.registers % 8 == tile.multiplying_registers % 8 == 0


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("num_tokens", [65, 128, 129, 192, 193, 256])
def test_tiles_fit_a_multiprocessor(num_tokens: int, shape: tuple[int, int]) -> None:
    tile = tile_for(num_tokens, *shape)
    if tile is None:
        out_features, in_features = shape
        assert num_tokens > 192, "torch's is faster nowhere else"
        assert in_features < out_features < 16384
        return
    assert tile.shared_bytes + tile.warpgroups * STORED_BYTES <= SHARED_BYTES - BARRIER_BYTES
    assert tile_for(257, *shape) is None


@pytest.mark.parametrize(
    ("shape", "taken"),
    [((28672, 4096), range(65, 113)), ((4096, 14336), range(97, 193)), ((6144, 4096), range(0))],
)
def test_products_of_16_bits(shape: tuple[int, int], taken: range) -> None:
    for num_tokens in (1, 64, 65, 96, 97, 112, 113, 128, 129, 192, 193, 256, 4096):
        tile = tile_for_16_bits(num_tokens, *shape)
        assert (tile is not None) == (num_tokens in taken)
        if tile is not None:
            needed = tile.shared_bytes + tile.warpgroups * STORED_BYTES
            assert needed <= SHARED_BYTES - BARRIER_BYTES


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("choose", [tile_for, tile_for_16_bits])
def test_some_numbers_of_tokens_have_all_tiles(choose, shape: tuple[int, int]) -> None:
    """Those are what start-up compiles for."""
    compiled = {choose(num_tokens, *shape) for num_tokens in token_counts()}
    assert {choose(num_tokens, *shape) for num_tokens in range(65, 257)} <= compiled | {None}


def test_rows_that_start_anywhere_are_the_librarys(monkeypatch: pytest.MonkeyPatch) -> None:
    """What copies tiles refuses them."""
    monkeypatch.setattr(linear_choice, "is_hopper", lambda _: True)
    x, weight = torch.empty(100, 72).bfloat16(), torch.empty(16384, 64).bfloat16()
    assert linear_choice._hopper_tile(x[:, 8:], weight) is not None
    assert linear_choice._hopper_tile(x[:, 4:68], weight) is None
    assert linear_choice._hopper_tile(x.flatten()[:7100].view(100, 71)[:, :64], weight) is None
    monkeypatch.setattr(linear_choice, "is_hopper", lambda _: False)
    assert linear_choice.linear(x[:, 8:], weight, None) is None


def test_a_ring_of_one_stage_would_stand_still() -> None:
    with pytest.raises(ValueError, match="takes two"):
        HopperTile(stages=1)
