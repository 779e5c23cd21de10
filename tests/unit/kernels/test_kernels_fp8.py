"""Fp8 kernels against the references: compiled on a GPU, in Triton's interpreter elsewhere."""

import pytest
import torch
from torch import Tensor
from triton_cases import DEVICE, HAS_GPU, needs_triton

from kernels.activation import silu_and_mul_fp8_reference, silu_and_mul_reference
from kernels.fp8 import (
    FP8,
    FP8_MAX,
    Fp8Rows,
    quantize_rows,
    quantize_rows_reference,
    quantize_weight,
)
from kernels.fp8_linear import Fp8Linear, fp8_linear, fp8_linear_reference
from kernels.gpu import activation, fp8, linear, linear_tiles, norm
from kernels.gpu import fp8_linear as fp8_dispatch
from kernels.gpu.linear_tiles import LinearTile
from kernels.norm import add_rms_norm_fp8, add_rms_norm_fp8_reference, add_rms_norm_reference

# The interpreter forgets to carry where rounding up reaches the next power of two.
DIFFERING = 0.002 if HAS_GPU else 0.05
SCALES = [None, torch.tensor([0.01])]
# Half of the last of e4m3's four significant bits.
ROUNDING = 2**-4


@pytest.fixture(autouse=True)
def _same_numbers_each_time() -> None:
    """How often the interpreter forgets depends on them."""
    torch.manual_seed(0)


def assert_rows_close(actual: Fp8Rows, expected: Fp8Rows) -> None:
    ratios = (actual.scales.cpu() / expected.scales).log2().abs()
    is_same = ratios < 1e-5
    # The interpreter takes its own errors for those of a scale, and may choose the other one.
    assert (is_same if HAS_GPU else is_same | ((ratios - 0.5).abs() < 1e-5)).all()
    values, wanted = actual.values.cpu()[is_same].float(), expected.values[is_same].float()
    assert (values != wanted).sum() <= DIFFERING * values.numel()
    assert ((values - wanted).abs() <= 0.51 * wanted.abs() + 2**-8).all()
    found, wanted = (
        Fp8Rows(rows.values.cpu(), rows.scales.cpu()).dequantized(torch.float32)
        for rows in (actual, expected)
    )
    assert ((found - wanted).abs() <= 0.6 * wanted.abs() + 2**-8 * expected.scales[:, None]).all()


def moved(scale: Tensor | None) -> Tensor | None:
    return None if scale is None else scale.to(DEVICE)


class TestReferences:
    def test_a_row_has_the_better_of_two_scales(self) -> None:
        x = torch.randn(50, 40)
        rows = quantize_rows(x)
        largest = x.abs().amax(1) / FP8_MAX
        errors = []
        for scale in (largest, largest * 2**0.5):
            rounded = (x / scale[:, None]).to(FP8).float() * scale[:, None]
            errors.append((rounded - x).square().sum(1))
        is_first = errors[0] <= errors[1]
        assert is_first.any()
        assert not is_first.all()
        expected = torch.where(is_first, largest, largest * 2**0.5)
        torch.testing.assert_close(rows.scales, expected)
        error = (rows.dequantized(torch.float32) - x).abs()
        assert (error <= ROUNDING * x.abs() + rows.scales[:, None] * 2**-10).all()

    def test_rows_of_zeros(self) -> None:
        rows = quantize_rows(torch.zeros(2, 8))
        assert torch.equal(rows.dequantized(torch.float32), torch.zeros(2, 8))

    def test_what_a_static_scale_cannot_reach_is_clamped(self) -> None:
        rows = quantize_rows(torch.tensor([[5.0, -1.0, 0.5]]), torch.tensor([0.001]))
        expected = torch.tensor([[0.448, -0.448, 0.448]])
        torch.testing.assert_close(rows.dequantized(torch.float32), expected)

    def test_weights_lose_less_than_by_the_largest_value_alone(self) -> None:
        weight = torch.randn(48, 200)
        rows, simple = quantize_weight(weight), quantize_rows(weight)
        assert (rows.values.float().abs() <= FP8_MAX).all()
        errors = [(x.dequantized(torch.float32) - weight).square().sum(1) for x in (rows, simple)]
        assert (errors[0] <= errors[1] * 1.0001).all()
        assert errors[0].sum() < 0.95 * errors[1].sum()

    def test_fused_quantization_is_the_operation_and_then_quantization(self) -> None:
        x, residual, weight = torch.randn(3, 64), torch.randn(3, 64), torch.rand(64) + 0.5
        normed, stream = add_rms_norm_reference(x, residual, weight, 1e-5)
        rows, fused_stream = add_rms_norm_fp8(x.clone(), residual.clone(), weight, 1e-5)
        assert_rows_close(rows, quantize_rows(normed))
        assert torch.equal(stream, fused_stream)

    def test_products(self) -> None:
        x, weight, bias = torch.randn(3, 32), torch.randn(16, 32), torch.randn(16)
        rows, packed = quantize_rows(x), Fp8Linear(quantize_rows(weight), bias, None)
        expected = rows.dequantized(x.dtype) @ packed.weight.dequantized(x.dtype).T + bias
        for given in (x, rows):
            torch.testing.assert_close(fp8_linear(given, packed, dtype=x.dtype), expected)
        part = fp8_linear(rows, packed.from_channel(4), dtype=x.dtype)
        torch.testing.assert_close(part, expected[:, 4:])
        with pytest.raises(ValueError, match=r"x is \(3, 16\)"):
            fp8_linear(torch.randn(3, 16), packed, dtype=x.dtype)


@needs_triton
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
class TestQuantizing:
    @pytest.mark.parametrize("size", [64, 100])
    def test_rows(self, scale: Tensor | None, dtype: torch.dtype, size: int) -> None:
        x = (3 * torch.randn(7, 2 * size)).to(dtype)[:, :size]
        x[2] = 0
        actual = fp8.quantize_rows(x.to(DEVICE), moved(scale))
        assert_rows_close(actual, quantize_rows_reference(x, scale))

    def test_the_better_scale_is_chosen(self, scale: Tensor | None, dtype: torch.dtype) -> None:
        """By rows that one of them has exactly, or nearly; none rounds up to a power of two."""
        if scale is not None:
            return
        fractions = torch.tensor([1.125, 1.25, 1.5, 1.625, 1.75])
        numbers = fractions[torch.randint(5, (2, 100))] * 2.0 ** torch.randint(0, 8, (2, 100))
        numbers[0, 0], numbers[1, 0] = FP8_MAX, 320.0
        actual = fp8.quantize_rows(numbers.to(DEVICE, dtype), None)
        expected = torch.tensor([1.0, 320.0 / FP8_MAX * 2**0.5])
        torch.testing.assert_close(actual.scales.cpu(), expected)
        assert_rows_close(actual, quantize_rows_reference(numbers))

    def test_after_rms_norm(self, scale: Tensor | None, dtype: torch.dtype) -> None:
        output, residual = (torch.randn(5, 96).to(dtype) for _ in range(2))
        weight = (torch.rand(96) + 0.5).to(dtype)
        for x in (output, None):
            expected, stream = add_rms_norm_fp8_reference(x, residual, weight, 1e-5, scale=scale)
            actual, actual_stream = norm.add_rms_norm_fp8(
                moved(x),
                residual.to(DEVICE, copy=True),
                weight.to(DEVICE),
                1e-5,
                scale=moved(scale),
            )
            assert_rows_close(actual, expected)
            assert torch.equal(actual_stream.cpu(), stream)

    @pytest.mark.parametrize("size", [96, 2048, 5000])
    @pytest.mark.parametrize("is_scaled", [False, True])
    def test_after_silu(
        self, scale: Tensor | None, dtype: torch.dtype, size: int, *, is_scaled: bool
    ) -> None:
        """In one chunk and in several, whole and not."""
        gate_up, scales = torch.randn(5, 2 * size), None
        if is_scaled:
            scales = torch.rand(5) + 0.01, torch.rand(2 * size) + 0.01
            gate_up /= scales[0][:, None] * scales[1]
        gate_up = gate_up.to(dtype)
        actual = activation.silu_and_mul_fp8(
            gate_up.to(DEVICE),
            scale=moved(scale),
            scales=scales and (scales[0].to(DEVICE), scales[1].to(DEVICE)),
        )
        assert_rows_close(actual, silu_and_mul_fp8_reference(gate_up, scale=scale, scales=scales))


SMALL = LinearTile(rows=16, inner=32, num_warps=1, num_stages=1)
SPLIT = LinearTile(rows=16, inner=32, splits=3, num_warps=1, num_stages=1)


@needs_triton
@pytest.mark.parametrize("num_tokens", [1, 5, 17])
@pytest.mark.parametrize("shape", [(48, 320), (50, 330)])
class TestLinear:
    """In multiples of the tile, and in none."""

    @pytest.mark.parametrize("tile", [None, SMALL, SPLIT])
    @pytest.mark.parametrize("bits", [8, 16])
    def test_against_reference(
        self, num_tokens: int, shape: tuple[int, int], tile: LinearTile | None, bits: int
    ) -> None:
        x, weight, bias = self.inputs(num_tokens, shape)
        given = quantize_rows_reference(x) if bits == 8 else x
        exact = given.dequantized(torch.float32) if isinstance(given, Fp8Rows) else x.float()
        expected = exact @ weight.dequantized(torch.float32).T + bias
        actual = self.run(given, weight, bias, tile=tile)
        torch.testing.assert_close(actual, expected, atol=2e-3, rtol=2e-3)
        residual = torch.randn(expected.shape)
        actual = self.run(given, weight, bias, tile=tile, residual=residual)
        torch.testing.assert_close(actual, expected + residual, atol=2e-3, rtol=2e-3)

    @pytest.mark.parametrize("bits", [8, 16])
    def test_gated(self, num_tokens: int, shape: tuple[int, int], bits: int) -> None:
        x, weight, bias = self.inputs(num_tokens, shape)
        rows = quantize_rows_reference(x)
        packed = Fp8Linear(weight, bias, None)
        product = fp8_linear_reference(rows, packed, dtype=torch.float32)
        actual = self.run(rows if bits == 8 else x, weight, bias, tile=SMALL, gated=True)
        torch.testing.assert_close(actual, silu_and_mul_reference(product), atol=2e-2, rtol=2e-3)

    def inputs(self, num_tokens: int, shape: tuple[int, int]) -> tuple[Tensor, Fp8Rows, Tensor]:
        """`x` is of numbers that 8 bits hold exactly where the largest of a tile is 7."""
        torch.manual_seed(0)
        x = torch.tensor([0.5, 1.5, -3.0, 3.5, -5.0, 6.0, 0.0])[
            torch.randint(7, (num_tokens, shape[1]))
        ]
        x[:, ::16] = 7.0
        x = x.half()
        return x, quantize_rows_reference(0.05 * torch.randn(shape)), torch.randn(shape[0])

    def run(
        self,
        x: Tensor | Fp8Rows,
        weight: Fp8Rows,
        bias: Tensor,
        *,
        tile: LinearTile | None,
        residual: Tensor | None = None,
        gated: bool = False,
    ) -> Tensor:
        def rows(x: Fp8Rows) -> Fp8Rows:
            return Fp8Rows(x.values.to(DEVICE), x.scales.to(DEVICE))

        given = rows(x) if isinstance(x, Fp8Rows) else x.to(DEVICE)
        stream = None if residual is None else residual.to(DEVICE, copy=True)
        out = linear.fp8_linear(
            given,
            rows(weight),
            bias.to(DEVICE),
            dtype=torch.float32,
            residual=stream,
            gated=gated,
            tile=tile,
        )
        return out.cpu()


@needs_triton
@pytest.mark.parametrize("is_fast", [True, False])
def test_few_tokens_are_quantized_apart_where_memory_is_fast(
    monkeypatch: pytest.MonkeyPatch, *, is_fast: bool
) -> None:
    """With a scale for each token, not for each tile of it."""
    monkeypatch.setattr(linear_tiles, "has_fast_memory", lambda _: is_fast)
    x, weight = torch.randn(3, 512).to(DEVICE), quantize_rows(torch.randn(32, 512).to(DEVICE))
    # One tile's numbers are much larger than another's.
    x[:, 256:] *= 100
    packed = Fp8Linear(weight, None, None)
    actual = fp8_dispatch.fp8_linear(x, packed, dtype=torch.float32)
    apart = fp8_dispatch.fp8_linear(quantize_rows(x), packed, dtype=torch.float32)
    assert torch.equal(actual, apart) == is_fast
    assert fp8_dispatch.gates_at_once(x) != is_fast


@needs_triton
def test_gated_products_keep_to_a_static_scale() -> None:
    """One that the largest inputs are far beyond."""
    x, weight = torch.randn(3, 64), quantize_rows_reference(torch.randn(32, 64))
    scale = torch.tensor([0.001])
    product = fp8_linear_reference(x, Fp8Linear(weight, None, scale), dtype=torch.float32)
    moved_weight = Fp8Rows(weight.values.to(DEVICE), weight.scales.to(DEVICE))
    packed = Fp8Linear(moved_weight, None, scale.to(DEVICE))
    actual = fp8_dispatch.gated_fp8_linear(x.to(DEVICE), packed, dtype=torch.float32)
    torch.testing.assert_close(actual.cpu(), silu_and_mul_reference(product), atol=2e-2, rtol=2e-3)
