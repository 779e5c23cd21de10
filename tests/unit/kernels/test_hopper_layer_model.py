"""A layer's kernel, run on a model of its machine: what is copied where and when, and who waits
for whom. tests/gpu has it compiled."""

import pytest
import torch
from torch import Tensor

from kernels.activation import silu_and_mul_reference
from kernels.fp8 import Fp8Rows, quantize_rows
from kernels.norm import rms_norm_reference

pytest.importorskip("triton.experimental.gluon")
from gluon_model import run_modelled

from kernels.gpu.hopper import (
    layer,
    layer_loading,
    layer_meeting,
    layer_multiplying,
    linear_loading,
)
from kernels.gpu.hopper.layer_shapes import LayerTile
from kernels.layer import LayerWeights, NextWeights

HEADS, HIDDEN, INTERMEDIATE, QKV = 1024, 512, 1024, 512
EPS = 1e-5
# Sums of another order round some number to its other neighbour in 8 bits, and many behind it.
ERROR = 2e-2


@pytest.fixture(autouse=True)
def _modelled(monkeypatch: pytest.MonkeyPatch) -> None:
    run_modelled(
        monkeypatch,
        "_layer_kernel",
        layer,
        layer_loading,
        layer_meeting,
        layer_multiplying,
        linear_loading,
    )


def random_rows(num_rows: int, size: int) -> Fp8Rows:
    return quantize_rows(torch.randn(num_rows, size) / size**0.5)


def random_weights() -> tuple[LayerWeights, NextWeights]:
    weights = LayerWeights(
        output=random_rows(HIDDEN, HEADS),
        norm=torch.rand(HIDDEN) + 0.5,
        gate_up=random_rows(2 * INTERMEDIATE, HIDDEN),
        down=random_rows(HIDDEN, INTERMEDIATE),
    )
    return weights, NextWeights(torch.rand(HIDDEN) + 0.5, random_rows(QKV, HIDDEN))


def error(actual: Tensor, wanted: Tensor) -> float:
    return ((actual - wanted).norm() / wanted.norm()).item()


def product(x: Tensor, weight: Fp8Rows) -> Tensor:
    return quantize_rows(x).dequantized(torch.float32) @ weight.dequantized(torch.float32).T


def expected(
    attended: Tensor, stream: Tensor, weights: LayerWeights, following: NextWeights
) -> tuple[Tensor, Tensor]:
    stream = stream + product(attended, weights.output)
    normed = rms_norm_reference(stream, weights.norm, EPS)
    activated = silu_and_mul_reference(product(normed, weights.gate_up))
    stream = stream + product(activated, weights.down)
    return stream, product(rms_norm_reference(stream, following.norm, EPS), following.qkv)


@pytest.mark.parametrize("has_next", [True, False])
@pytest.mark.parametrize(
    ("num_tokens", "tile", "num_programs"),
    [
        (1, LayerTile(stages=2, token_stages=3), 16),
        (7, LayerTile(stages=3, asked=1, narrow=64, warps=8), 18),
        (13, LayerTile(tokens=16, gates=64, asked=4), 17),
        (17, LayerTile(tokens=32, stages=2, token_stages=2, gates=32, narrow=32), 33),
        (20, LayerTile(tokens=64, stages=5, token_stages=4, gates=64), 24),
    ],
)
def test_a_layer(
    monkeypatch: pytest.MonkeyPatch,
    num_tokens: int,
    tile: LayerTile,
    num_programs: int,
    *,
    has_next: bool,
) -> None:
    monkeypatch.setattr(layer, "num_multiprocessors", lambda _: num_programs)
    torch.manual_seed(0)
    weights, following = random_weights()
    for _ in range(2):
        attended, stream = torch.randn(num_tokens, HEADS), torch.randn(num_tokens, HIDDEN)
        wanted, wanted_qkv = expected(attended, stream, weights, following)
        given = following if has_next else None
        qkv = layer.layer_products(attended, stream, weights, given, EPS, tile=tile)
        assert error(stream, wanted) < ERROR
        assert (qkv is not None) == has_next
        if qkv is not None:
            assert error(qkv, wanted_qkv) < ERROR
