"""A layer's kernel, run on a model of its machine: what is copied where and when, and who waits
for whom. The model knows no fences of global memory, nor kernels that overlap: tests/gpu has it
compiled."""

import pytest
import torch
from torch import Tensor

from kernels.fp8 import Fp8Rows, quantize_rows

pytest.importorskip("triton.experimental.gluon")
import gluon_threads
from gluon_model import change_source, run_modelled

from kernels.gpu.hopper import (
    layer,
    layer_loading,
    layer_meeting,
    layer_multiplying,
    layer_rows,
    linear_loading,
)
from kernels.gpu.hopper.layer_shapes import LayerTile
from kernels.layer import LayerWeights, NextWeights, joined_products_reference

HEADS, HIDDEN, INTERMEDIATE, QKV = 512, 1024, 1024, 640
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
        layer_rows,
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


@pytest.mark.parametrize("has_next", [True, False])
@pytest.mark.parametrize(
    ("num_tokens", "tile", "num_programs"),
    [
        (1, LayerTile(tokens=8, stages=4, token_stages=3), 32),
        (7, LayerTile(tokens=8, stages=5, asked=1, narrow=64), 18),
        (13, LayerTile(tokens=16, asked=4), 33),
        (32, LayerTile(tokens=32, stages=4, token_stages=2, qkv=32), 32),
        (20, LayerTile(tokens=64, stages=5, token_stages=4), 34),
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
        given = following if has_next else None
        wanted = stream.clone()
        wanted_qkv = joined_products_reference(attended, wanted, weights, given, EPS)
        qkv = layer.layer_products(attended, stream, weights, given, EPS, tile=tile)
        assert error(stream, wanted) < ERROR
        assert (qkv is not None) == has_next
        if qkv is not None and wanted_qkv is not None:
            assert error(qkv, wanted_qkv) < ERROR


@pytest.mark.parametrize("which", ["ATTENDED", "ATTENTION_ADDED", "MLP_INPUT", "ACTIVATED"])
def test_who_does_not_come_is_missed(monkeypatch: pytest.MonkeyPatch, which: str) -> None:
    monkeypatch.setattr(layer, "num_multiprocessors", lambda _: 32)
    # Its counters are left as nobody should find them.
    monkeypatch.setattr(layer, "_counters", lambda _: torch.zeros(6 * 32, dtype=torch.int32))
    monkeypatch.setattr(gluon_threads, "PATIENCE_S", 1.0)
    is_copied = which != "ATTENTION_ADDED"
    arrival = f"arrive(counters, {which}, IS_COPIED={is_copied})"
    change_source(
        monkeypatch, layer_multiplying.multiply_layer, arrival, "pass", layer, layer_multiplying
    )
    weights, following = random_weights()
    attended, stream = torch.randn(2, HEADS), torch.randn(2, HIDDEN)
    tile = LayerTile(tokens=8)
    with pytest.raises(AssertionError, match="in vain"):
        layer.layer_products(attended, stream, weights, following, EPS, tile=tile)
