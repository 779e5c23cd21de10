"""Products that add to the residual stream on their way: the sum that two kernels would make."""

import pytest
import torch
from torch import Tensor

from kernels.fp8 import Fp8Rows, quantize_rows
from kernels.fp8_linear import (
    Fp8Linear,
    add_fp8_linear,
    fp8_linear_reference,
    unscaled_sums,
)
from kernels.gpu import cublaslt
from kernels.gpu.cublaslt_library import loaded_library
from kernels.gpu.cublaslt_shapes import Shape
from kernels.gpu.linear_tiles import few_fp8_tokens
from kernels.linear import add_linear, linear_reference, pack_linear

DTYPE = torch.bfloat16
SHAPES = [(4096, 14336), (4096, 4096), (960, 576), (48, 80)]
NUM_TOKENS = (1, 16, 33, 64, 65, 300, 2048, 2051)
# bfloat16 keeps 8 bits; sums of thousands in the tensor cores' short accumulators lose as much.
ERROR = 4e-3
# Of 16-bit inputs, quantization keeps 4 bits.
QUANTIZED_ERROR = 4e-2


def random(*shape: int) -> Tensor:
    return torch.randn(shape, device="cuda", dtype=DTYPE)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("num_tokens", NUM_TOKENS)
@pytest.mark.parametrize("has_bias", [False, True])
def test_dense(shape: tuple[int, int], num_tokens: int, *, has_bias: bool) -> None:
    x, residual = random(num_tokens, shape[1]), random(num_tokens, shape[0])
    packed = pack_linear(random(*shape), random(shape[0]) if has_bias else None)
    stream = residual.clone()
    if add_linear(x, packed, stream):
        exact = pack_linear(packed.weight.double(), None)
        bias = 0.0 if packed.bias is None else packed.bias.double()
        expected = linear_reference(x.double(), exact) + bias + residual.double()
        assert relative_error(stream, expected) < ERROR
    else:
        assert has_bias
        assert torch.equal(stream, residual)


def library_adds() -> bool:
    """As cuBLAS does on Hopper since 12.9."""
    has_library = torch.cuda.is_available() and loaded_library() is not None
    return has_library and torch.cuda.get_device_capability()[0] == 9


def fp8_expected(rows: Fp8Rows, packed: Fp8Linear, residual: Tensor) -> Tensor:
    return fp8_linear_reference(rows, packed, dtype=torch.float32) + residual.float()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("num_tokens", NUM_TOKENS)
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("is_quantized", [False, True])
def test_fp8(
    shape: tuple[int, int], num_tokens: int, *, has_bias: bool, is_quantized: bool
) -> None:
    x = random(num_tokens, shape[1])
    # As large as the product: one of both that's missing shows.
    residual = random(num_tokens, shape[0]) * shape[1] ** 0.5
    bias = random(shape[0]) * shape[1] ** 0.5 if has_bias else None
    packed = Fp8Linear(quantize_rows(random(*shape)), bias, None)
    rows, stream = quantize_rows(x), residual.clone()
    if add_fp8_linear(rows if is_quantized else x, packed, stream):
        # In our kernels, the scales of rows quantized on the way are finer.
        is_finer = not is_quantized and num_tokens <= few_fp8_tokens(x.device)
        bound = QUANTIZED_ERROR if is_finer else ERROR
        assert relative_error(stream, fp8_expected(rows, packed, residual)) < bound
    else:
        assert num_tokens > 64
        assert not library_adds()
        assert torch.equal(stream, residual)


class TestLibrary:
    """cuBLASLt's product, by itself."""

    @pytest.fixture(autouse=True)
    def needs_the_library(self) -> None:
        if not library_adds():
            pytest.skip("needs a Hopper GPU and cuBLAS 12.9")

    def test_in_a_graph_behind_what_writes_its_input(self) -> None:
        """Replayed on another stream than it was captured on, and beside calls without a graph."""
        packed = [Fp8Linear(quantize_rows(random(1024, 1024)), None, None) for _ in range(3)]
        x = random(300, 1024)

        def chain() -> Tensor:
            stream = x.clone()
            for each in packed * 4:
                assert add_fp8_linear(stream, each, stream)
                stream *= 2**-5
            return stream

        expected = chain()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = chain()
        for _ in range(10):
            graph.replay()
            assert torch.equal(chain(), expected)
            assert torch.equal(captured, expected)

    @pytest.mark.parametrize("adds", [False, True])
    @pytest.mark.parametrize("has_bias", [False, True])
    def test_all_algorithms(self, *, adds: bool, has_bias: bool) -> None:
        x, residual = quantize_rows(random(2051, 4096)), random(2051, 1024) * 64
        bias = random(1024) * 64 if has_bias else None
        packed = Fp8Linear(quantize_rows(random(1024, 4096)), bias, None)
        shape = Shape(2051, 1024, 4096, has_bias=has_bias, adds=adds)
        expected = fp8_expected(x, packed, residual if adds else torch.zeros_like(residual))
        found = cublaslt.products(shape, residual.device, 8)
        assert found
        for product in found:
            stream = residual.clone()
            assert product(x, packed.weight, bias, stream)
            assert relative_error(stream, expected) < ERROR

    @pytest.mark.parametrize("has_bias", [False, True])
    def test_the_tile_that_was_measured(self, *, has_bias: bool) -> None:
        x, residual = quantize_rows(random(8192, 14336)), random(8192, 4096) * 128
        bias = random(4096) * 128 if has_bias else None
        packed = Fp8Linear(quantize_rows(random(4096, 14336)), bias, None)
        shape = Shape(8192, 4096, 14336, has_bias=has_bias, adds=True)
        found = cublaslt.products(shape, residual.device, 2)
        library = loaded_library()
        assert library is not None
        if library.cublasLtGetVersion() // 100 == 1301:
            assert [product.choices["tile"] for product in found][:1] == [24]
            assert len(found) == 2
        expected = fp8_expected(x, packed, residual)
        for product in found:
            stream = residual.clone()
            assert product(x, packed.weight, bias, stream)
            assert relative_error(stream, expected) < ERROR

    @pytest.mark.parametrize("num_tokens", [2048, 2500])
    def test_the_tile_that_was_measured_without_scales(self, num_tokens: int) -> None:
        x, weight = quantize_rows(random(num_tokens, 4096)), quantize_rows(random(3072, 4096))
        shape = Shape(num_tokens, 3072, 4096, has_bias=False, adds=False, has_scales=False)
        found = cublaslt.products(shape, x.values.device, 2)
        library = loaded_library()
        assert library is not None
        is_known = library.cublasLtGetVersion() // 100 == 1301
        if is_known:
            assert found[0].choices["tile"] == 201
        expected = x.values.double() @ weight.values.double().T
        for product in found:
            out = torch.full((num_tokens, 3072), torch.nan, dtype=DTYPE, device="cuda")
            assert product(x, weight, None, out)
            assert relative_error(out, expected) < ERROR
        sums = unscaled_sums(x, weight)
        assert (sums is not None) == is_known
        assert sums is None or relative_error(sums, expected) < ERROR

    def test_what_is_overwritten_may_be_no_numbers(self) -> None:
        x, weight = quantize_rows(random(300, 256)), quantize_rows(random(512, 256))
        shape = Shape(300, 512, 256, has_bias=False, adds=False)
        out = torch.full((300, 512), torch.nan, dtype=DTYPE, device="cuda")
        assert cublaslt.products(shape, out.device)[0](x, weight, None, out)
        assert out.isfinite().all()

    def test_what_it_does_not_take(self) -> None:
        weight = quantize_rows(random(512, 256))
        residual = random(301, 512)
        for bias, stream in (
            (None, residual.half()),
            (None, residual.float()),
            (torch.zeros(512, device="cuda"), residual),
            (None, random(512, 301).T),
            (None, residual.view(-1)[8 : 8 + 300 * 512].view(300, 512)),
        ):
            assert cublaslt.adding_product(len(stream), weight, bias, stream) is None
        product = cublaslt.adding_product(300, weight, None, residual[:300])
        assert product is not None
        rows, before = quantize_rows(random(301, 256)), residual.clone()
        part = Fp8Rows(rows.values[1:], rows.scales[1:])
        assert not product(part, weight, None, residual[:300])
        assert torch.equal(residual, before)
