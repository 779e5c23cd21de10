"""Products that take the RMS norm of their inputs on the way, against a norm and then a product."""

from importlib.metadata import version

import pytest
import torch
from torch import Tensor

from kernels.activation import silu_and_mul_reference
from kernels.fp8 import Fp8Rows, quantize_rows_reference
from kernels.fp8_linear import Fp8Linear, fp8_linear, gated_fp8_linear
from kernels.linear import linear, pack_linear
from kernels.norm import Unnormalised, rms_norm_reference

pytest.importorskip("triton")
from kernels.gpu import linear as few_tokens
from kernels.gpu import linear_tiles
from kernels.gpu.linear_tiles import LinearTile

HAS_GPU = torch.cuda.is_available()
DEVICE = "cuda" if HAS_GPU else "cpu"
needs_triton = pytest.mark.skipif(
    not HAS_GPU and version("triton") < "3.7",
    reason="before 3.7, Triton's interpreter fails with NumPy 2.4",
)
EPS = 1e-5
TILES = [
    LinearTile(rows=16, inner=32, num_warps=1, num_stages=1),
    LinearTile(rows=16, inner=64, num_warps=1, num_stages=1, least_tokens=8),
    None,
]
SHAPES = [(48, 320), (50, 330)]
ERROR = 2e-3


def unnormalised(num_tokens: int, size: int) -> Unnormalised:
    """Rows of lengths that differ by orders of magnitude, of numbers that 8 bits hold exactly where
    the largest of a tile is 7 times a power of two."""
    torch.manual_seed(0)
    values = torch.tensor([0.5, 1.5, -3.0, 3.5, -5.0, 6.0, 0.0])
    rows = values[torch.randint(7, (num_tokens, size))]
    rows[:, ::16] = 7.0
    rows *= 4.0 ** torch.arange(-3, num_tokens - 3)[:, None]
    weight = 2.0 ** (torch.arange(size) // 32 % 3 - 1)
    return Unnormalised(rows.half(), weight.half(), EPS)


def moved(x: Unnormalised) -> Unnormalised:
    return Unnormalised(x.rows.to(DEVICE), x.weight.to(DEVICE), x.eps)


def normed(x: Unnormalised) -> Tensor:
    return rms_norm_reference(x.rows.float(), x.weight.float(), x.eps)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Of the worst row."""
    difference = (actual.cpu().double() - expected.double()).norm(dim=1)
    return (difference / expected.double().norm(dim=1)).max().item()


@needs_triton
@pytest.mark.parametrize("num_tokens", [1, 4, 5])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("tile", TILES)
class TestKernel:
    def test_16_bits(
        self, num_tokens: int, shape: tuple[int, int], tile: LinearTile | None
    ) -> None:
        x = unnormalised(num_tokens, shape[1])
        weight, bias = torch.randn(shape).half(), torch.randn(shape[0]).half()
        expected = normed(x) @ weight.float().T + bias.float()
        actual = few_tokens.linear(moved(x), weight.to(DEVICE), bias.to(DEVICE), tile=tile)
        assert actual.dtype is torch.float16
        assert relative_error(actual, expected) < ERROR

    def test_8_bits(self, num_tokens: int, shape: tuple[int, int], tile: LinearTile | None) -> None:
        x, weight = unnormalised(num_tokens, shape[1]), quantize_rows_reference(torch.randn(shape))
        expected = normed(x) @ weight.dequantized(torch.float32).T
        packed = Fp8Rows(weight.values.to(DEVICE), weight.scales.to(DEVICE))
        options = {"dtype": torch.float32, "tile": tile}
        actual = few_tokens.fp8_linear(moved(x), packed, None, **options)
        assert relative_error(actual, expected) < ERROR
        actual = few_tokens.fp8_linear(moved(x), packed, None, **options, gated=True)
        assert relative_error(actual, silu_and_mul_reference(expected)) < ERROR


@needs_triton
def test_a_product_that_is_split_takes_no_norm() -> None:
    x, weight = moved(unnormalised(2, 64)), torch.randn(16, 64).half().to(DEVICE)
    with pytest.raises(ValueError, match="is not split"):
        few_tokens.linear(x, weight, None, tile=LinearTile(inner=32, splits=2))


def test_which_products_take_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_tiles, "NORM_IN_PRODUCT_TOKENS", 3)
    monkeypatch.setattr(linear_tiles, "NORM_IN_FP8_PRODUCT_TOKENS", 0)
    normalises = linear_tiles.normalises
    taken = [normalises(num, 6144, 4096, is_fp8=False) for num in range(5)]
    assert taken == [False, True, True, True, False]
    # Split in two.
    assert not normalises(1, 4096, 14336, is_fp8=False)
    assert not any(normalises(num, 6144, 4096, is_fp8=True) for num in range(5))


def test_elsewhere_a_norm_comes_before_the_product() -> None:
    x, weight = unnormalised(3, 64), torch.randn(32, 64)
    x = Unnormalised(x.rows.float(), x.weight.float(), x.eps)
    torch.testing.assert_close(linear(x, pack_linear(weight)), normed(x) @ weight.T)
    for scale in (None, torch.tensor([0.02])):
        packed = Fp8Linear(quantize_rows_reference(weight), None, scale)
        rows = quantize_rows_reference(normed(x), scale)
        expected = fp8_linear(rows, packed, dtype=torch.float32)
        torch.testing.assert_close(fp8_linear(x, packed, dtype=torch.float32), expected)
        gated = gated_fp8_linear(x, packed, dtype=torch.float32, then=None)
        torch.testing.assert_close(gated, silu_and_mul_reference(expected))
