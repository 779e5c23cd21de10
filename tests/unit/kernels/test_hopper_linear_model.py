"""Hopper's products, run on a model of its machine: what is copied where and when,
who waits for whom, and how parts of sums meet. tests/gpu has it compiled."""

import itertools
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kernels.fp8 import FP8, Fp8Rows

pytest.importorskip("triton.experimental.gluon")
from gluon_model import run_modelled

from kernels.gpu.hopper import linear, linear_loading, multiplying
from kernels.gpu.hopper.linear_tiles import HopperTile

NUM_MULTIPROCESSORS = 3
TILES = [
    HopperTile(stages=3),
    HopperTile(warpgroups=1, columns=64, stages=4, splits=3),
    HopperTile(warpgroups=3, stages=2, splits=5, merged=8),
    HopperTile(rows=128, stages=2, splits=2, promoted=1),
    HopperTile(tokens_are_rows=False, stages=3, splits=4, promoted=2),
    HopperTile(
        tokens_are_rows=False, rows=128, warpgroups=1, stages=2, splits=7, merged=3, programs=2
    ),
    HopperTile(tokens_are_rows=False, columns=256, stages=2, inner_bytes=256),
]


@pytest.fixture(autouse=True)
def _modelled(monkeypatch: pytest.MonkeyPatch) -> None:
    run_modelled(monkeypatch, "_hopper_linear_kernel", linear, linear_loading, multiplying)
    monkeypatch.setattr(linear, "num_multiprocessors", lambda _: NUM_MULTIPROCESSORS)


def random_rows(num_rows: int, size: int) -> Fp8Rows:
    """Whole numbers, so that sums are exact in any order."""
    values = torch.randint(-8, 9, (num_rows, size)).float().to(FP8)
    return Fp8Rows(values, torch.rand(num_rows) + 0.5)


def expected(x: Fp8Rows, weight: Fp8Rows, added: Tensor) -> Tensor:
    sums = x.values.float() @ weight.values.float().T
    return sums * x.scales[:, None] * weight.scales[None, :] + added


@pytest.mark.parametrize("tile", TILES, ids=str)
@pytest.mark.parametrize("num_tokens", [65, 128, 200])
def test_products(num_tokens: int, tile: HopperTile) -> None:
    torch.manual_seed(0)
    x, weight, bias = random_rows(num_tokens, 1104), random_rows(304, 1104), torch.randn(304)
    residual = torch.randn(num_tokens, 304)
    options = {"dtype": torch.float32, "tile": tile}
    wanted = expected(x, weight, bias)
    for _ in range(2):
        actual = linear.hopper_fp8_linear(x, weight, bias, **options)
        torch.testing.assert_close(actual, wanted, atol=1e-3, rtol=1e-5)
    wanted = expected(x, weight, residual)
    assert linear.hopper_fp8_linear(x, weight, None, residual=residual, **options) is residual
    torch.testing.assert_close(residual, wanted, atol=1e-3, rtol=1e-5)


@pytest.mark.parametrize("tile", [TILES[1], TILES[2], TILES[6]], ids=str)
def test_products_of_16_bits(tile: HopperTile) -> None:
    torch.manual_seed(0)
    x = torch.randint(-8, 9, (130, 1104)).bfloat16()
    weight = torch.randint(-8, 9, (304, 1104)).bfloat16()
    bias, residual = torch.randn(304).bfloat16(), torch.randn(130, 304).bfloat16()
    sums = x.float() @ weight.float().T
    actual = linear.hopper_linear(x, weight, bias, tile=tile)
    torch.testing.assert_close(actual, (sums + bias).bfloat16())
    wanted = (sums + residual.float()).bfloat16()
    linear.hopper_linear(x, weight, None, tile=tile, residual=residual)
    torch.testing.assert_close(residual, wanted)


def test_counters_are_left_as_they_were_found() -> None:
    x, weight = random_rows(70, 1100 // 16 * 16), random_rows(256, 1100 // 16 * 16)
    for splits, merged in itertools.product((2, 3, 6, 9), (2, 3, 16)):
        tile = replace(TILES[0], splits=splits, merged=merged)
        linear.hopper_fp8_linear(x, weight, None, dtype=torch.bfloat16, tile=tile)
        assert not linear._counters(x.values.device).any()


def test_splits_beyond_the_counters() -> None:
    x, weight = random_rows(70, 4096), random_rows(64, 4096)
    with pytest.raises(ValueError, match="too many"):
        linear.hopper_fp8_linear(x, weight, None, dtype=torch.bfloat16, tile=HopperTile(splits=17))
