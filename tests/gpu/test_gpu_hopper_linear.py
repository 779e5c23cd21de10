"""Hopper's own products against float64."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kernels.fp8 import Fp8Rows, quantize_rows
from kernels.fp8_linear import Fp8Linear, add_fp8_linear, fp8_linear
from kernels.gpu.hopper.linear_tiles import HopperTile, tile_for, tile_for_16_bits
from kernels.linear import add_linear, linear, pack_linear

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9,
    reason="needs a Hopper GPU",
)
DTYPE = torch.bfloat16
NUM_TOKENS = (65, 72, 127, 128, 129, 200, 256)
# The second and third end within a tile, a step, and a swizzled line.
SHAPES = [(4096, 4096), (960, 576), (336, 1104)]
TILES = [
    HopperTile(stages=6),
    HopperTile(columns=256, splits=3),
    HopperTile(rows=128, splits=4, merged=4),
    HopperTile(warpgroups=3, stages=5, splits=7, merged=3),
    HopperTile(warpgroups=1, columns=64, programs=2, splits=5),
    HopperTile(inner_bytes=256, stages=3, splits=2),
    HopperTile(tokens_are_rows=False, columns=256, splits=2),
    HopperTile(tokens_are_rows=False, rows=128, splits=6),
    HopperTile(tokens_are_rows=False, warpgroups=3, stages=4),
    HopperTile(tokens_are_rows=False, rows=128, warpgroups=1, stages=3, programs=2, splits=9),
]
# Of the tensor cores' 14 bits, over sums of thousands; of sums that are added up in float32.
SHORT_ERROR, PROMOTED_ERROR = 3e-3, 6e-4
# bfloat16 keeps 8 bits of a result.
RESULT_ERROR = 4e-3


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return ((actual.double() - expected).norm() / expected.norm()).item()


def random(*shape: int) -> Tensor:
    return torch.randn(shape, device="cuda", dtype=DTYPE)


def exact(x: Fp8Rows, weight: Fp8Rows) -> Tensor:
    return x.dequantized(torch.float64) @ weight.dequantized(torch.float64).T


def multiply(x: Fp8Rows, weight: Fp8Rows, bias: Tensor | None, **options) -> Tensor:
    from kernels.gpu.hopper.linear import hopper_fp8_linear

    return hopper_fp8_linear(x, weight, bias, **options)


@pytest.mark.parametrize("tile", TILES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_products(shape: tuple[int, int], tile: HopperTile) -> None:
    torch.manual_seed(0)
    weight, bias = quantize_rows(random(*shape)), random(shape[0])
    for num_tokens in NUM_TOKENS:
        x = quantize_rows(random(num_tokens, shape[1]))
        expected, residual = exact(x, weight), random(num_tokens, shape[0])
        actual = multiply(x, weight, None, dtype=torch.float32, tile=tile)
        assert relative_error(actual, expected) < SHORT_ERROR
        actual = multiply(x, weight, bias, dtype=DTYPE, tile=tile)
        assert relative_error(actual, expected + bias.double()) < RESULT_ERROR
        for _ in range(5):
            assert torch.equal(multiply(x, weight, bias, dtype=DTYPE, tile=tile), actual)
        expected += residual.double()
        multiply(x, weight, None, dtype=DTYPE, tile=tile, residual=residual)
        assert relative_error(residual, expected) < RESULT_ERROR


@pytest.mark.parametrize("tile", TILES, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_products_of_16_bits(dtype: torch.dtype, tile: HopperTile) -> None:
    from kernels.gpu.hopper.linear import hopper_linear

    torch.manual_seed(0)
    for shape in SHAPES:
        weight, bias = random(*shape).to(dtype), random(shape[0]).to(dtype)
        for num_tokens in NUM_TOKENS:
            # Rows of a wider tensor.
            x = random(num_tokens, shape[1] + 64).to(dtype)[:, : shape[1]]
            residual = random(num_tokens, shape[0]).to(dtype)
            expected = x.double() @ weight.double().T
            actual = hopper_linear(x, weight, bias, tile=tile)
            assert relative_error(actual, expected + bias.double()) < RESULT_ERROR
            assert torch.equal(hopper_linear(x, weight, bias, tile=tile), actual)
            expected += residual.double()
            hopper_linear(x, weight, None, tile=tile, residual=residual)
            assert relative_error(residual, expected) < RESULT_ERROR


@pytest.mark.parametrize("promoted", [1, 3])
@pytest.mark.parametrize("tile", [TILES[0], replace(TILES[4], splits=3)], ids=str)
def test_sums_that_are_promoted(tile: HopperTile, promoted: int) -> None:
    torch.manual_seed(0)
    x, weight = quantize_rows(random(100, 14336)), quantize_rows(random(512, 14336))
    tile = replace(tile, promoted=promoted)
    actual = multiply(x, weight, None, dtype=torch.float32, tile=tile)
    assert relative_error(actual, exact(x, weight)) < PROMOTED_ERROR


def test_in_a_graph_behind_what_writes_its_input() -> None:
    """Kernels start before their predecessors have ended: inputs and sums must not."""
    torch.manual_seed(0)
    weights = [quantize_rows(random(4096, 4096)) for _ in range(3)]
    x, tile = random(128, 4096), HopperTile(stages=6, splits=4)

    def chain() -> Tensor:
        stream = x.clone()
        for weight in weights * 4:
            stream = multiply(quantize_rows(stream), weight, None, dtype=DTYPE, tile=tile)
            stream *= 2**-6
        return stream

    expected = chain()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = chain()
    for _ in range(20):
        graph.replay()
        assert torch.equal(captured, expected)


@pytest.mark.parametrize("num_tokens", NUM_TOKENS)
@pytest.mark.parametrize("shape", [(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)])
def test_layers_use_it(shape: tuple[int, int], num_tokens: int) -> None:
    torch.manual_seed(0)
    packed = Fp8Linear(quantize_rows(random(*shape)), random(shape[0]), None)
    x = quantize_rows(random(num_tokens, shape[1]))
    residual = random(num_tokens, shape[0])
    assert packed.bias is not None
    expected = exact(x, packed.weight) + packed.bias.double()
    assert relative_error(fp8_linear(x, packed, dtype=DTYPE), expected) < RESULT_ERROR
    expected += residual.double()
    has_tile = tile_for(num_tokens, *shape) is not None
    if add_fp8_linear(x, packed, residual):
        assert relative_error(residual, expected) < RESULT_ERROR
    else:
        assert not has_tile


@pytest.mark.parametrize("num_tokens", [65, 100, 112, 128, 192])
@pytest.mark.parametrize("shape", [(28672, 4096), (4096, 14336)])
def test_layers_of_16_bits_use_it(shape: tuple[int, int], num_tokens: int) -> None:
    torch.manual_seed(0)
    packed = pack_linear(random(*shape), random(shape[0]))
    x, residual = random(num_tokens, shape[1]), random(num_tokens, shape[0])
    assert packed.bias is not None
    expected = x.double() @ packed.weight.double().T + packed.bias.double()
    assert relative_error(linear(x, packed), expected) < RESULT_ERROR
    expected += residual.double()
    is_faster = tile_for_16_bits(num_tokens, *shape) is not None
    assert add_linear(x, packed, residual) == is_faster
    if is_faster:
        assert relative_error(residual, expected) < RESULT_ERROR
