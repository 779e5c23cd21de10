"""Which layers are taken whole; on any machine."""

import pytest
import torch

from kernels.fp8 import FP8, Fp8Rows
from kernels.gpu import cards
from kernels.gpu.hopper import layer_shapes
from kernels.gpu.hopper.layer_shapes import MAX_TOKENS, tile_for
from kernels.layer import LayerWeights, NextWeights, joined_products, joins_products

BF16 = torch.bfloat16


@pytest.fixture(autouse=True)
def _an_h100(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layer_shapes, "is_hopper", lambda _: True)
    monkeypatch.setattr(layer_shapes, "num_multiprocessors", lambda _: 132)
    monkeypatch.setattr(layer_shapes, "has_fast_memory", lambda _: False)
    monkeypatch.setattr(layer_shapes, "shares_multiprocessors", lambda: False)


def rows(num_rows: int, size: int) -> Fp8Rows:
    values = torch.empty((num_rows, size), dtype=FP8, device="meta")
    return Fp8Rows(values, torch.empty(num_rows, device="meta"))


def layer(
    hidden: int = 4096, intermediate: int = 14336, qkv: int = 6144
) -> tuple[LayerWeights, NextWeights]:
    norm = torch.empty(hidden, device="meta")
    weights = LayerWeights(
        output=rows(hidden, hidden),
        norm=norm,
        gate_up=rows(2 * intermediate, hidden),
        down=rows(hidden, intermediate),
    )
    return weights, NextWeights(norm, rows(qkv, hidden))


@pytest.mark.parametrize("num_tokens", [9, 16, 17, 32, 33, MAX_TOKENS])
def test_llama_8b(num_tokens: int) -> None:
    tile = tile_for(*layer(), num_tokens, BF16)
    assert tile is not None
    assert tile.tokens // 2 < num_tokens <= tile.tokens
    assert (tile.narrow, tile.qkv) == (32, 64)
    assert tile_for(layer()[0], None, num_tokens, BF16) is not None


@pytest.mark.parametrize("num_tokens", [1, 8, MAX_TOKENS + 1])
def test_few_and_many_tokens_have_kernels_of_their_own(num_tokens: int) -> None:
    assert tile_for(*layer(), num_tokens, BF16) is None


@pytest.mark.parametrize("num_tokens", [1, 8, 9, MAX_TOKENS])
def test_fewer_tokens_where_memory_is_faster(
    monkeypatch: pytest.MonkeyPatch, num_tokens: int
) -> None:
    h100 = tile_for(*layer(), MAX_TOKENS, BF16)
    monkeypatch.setattr(layer_shapes, "has_fast_memory", lambda _: True)
    h200 = tile_for(*layer(), num_tokens, BF16)
    assert h100 is not None
    assert h200 is not None
    assert h200.asked > h100.asked
    assert tile_for(*layer(), MAX_TOKENS + 1, BF16) is None


@pytest.mark.parametrize(
    "sizes",
    [
        {"hidden": 2048},  # too few programs
        {"hidden": 8192},  # too many
        {"intermediate": 8192},
        {"intermediate": 28672},
        {"intermediate": 12352},  # programs' channels end within a tile
        {"qkv": 2048},
        {"qkv": 6100},
        {"hidden": 3072, "intermediate": 12288, "qkv": 4096},  # some with the last product alone
    ],
    ids=str,
)
def test_other_shapes_have_kernels_of_their_own(sizes: dict[str, int]) -> None:
    assert tile_for(*layer(**sizes), 16, BF16) is None


def test_float32_and_other_cards(monkeypatch: pytest.MonkeyPatch) -> None:
    assert tile_for(*layer(), 16, torch.float32) is None
    monkeypatch.setattr(layer_shapes, "is_hopper", lambda _: False)
    assert tile_for(*layer(), 16, BF16) is None


def test_not_where_other_processes_have_multiprocessors(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """There, programs that wait for each other might not all run."""
    monkeypatch.setattr(layer_shapes, "shares_multiprocessors", cards.shares_multiprocessors)
    monkeypatch.setenv("CUDA_MPS_PIPE_DIRECTORY", "/somewhere")
    cards.shares_multiprocessors.cache_clear()
    try:
        assert tile_for(*layer(), 16, BF16) is None
    finally:
        cards.shares_multiprocessors.cache_clear()


def test_not_on_a_cpu() -> None:
    weights, following = layer()
    assert not joins_products(weights, following, 16, BF16)
    with pytest.raises(ValueError, match="aren't joined"):
        joined_products(
            torch.empty(100, 4096), torch.empty(100, 4096), weights, following, eps=1e-5
        )
