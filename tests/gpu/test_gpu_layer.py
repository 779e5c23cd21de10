"""All products of a layer in one kernel against torch, alone and in a graph."""

import pytest
import torch
from torch import Tensor

from kernels.fp8 import Fp8Rows, quantize_rows
from kernels.gpu.hopper import layer_shapes
from kernels.layer import (
    LayerWeights,
    NextWeights,
    joined_products,
    joined_products_reference,
    joins_products,
)

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9,
    reason="needs a Hopper GPU",
)
HIDDEN, INTERMEDIATE, QKV = 4096, 14336, 6144
EPS = 1e-5
# Sums of another order round some numbers to their other neighbours in 8 bits, and more and more
# behind them; by themselves, such roundings are an error of 2.6e-2. Now and then a token's largest
# number does, and so its scale, with which all of it is rounded anew: errors are of many tokens.
ADDED_ERROR, QKV_ERROR = 2e-2, 4e-2
LEAST_COMPARED = 32
NUM_LAYERS, NUM_REPLAYS = 3, 20


@pytest.fixture(autouse=True)
def _for_any_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer, too, than this card takes it for."""
    monkeypatch.setattr(layer_shapes, "least_tokens", lambda _: 1)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()


def random_rows(num_rows: int, size: int) -> Fp8Rows:
    return quantize_rows(torch.randn(num_rows, size, device="cuda") / size**0.5)


def random_layer(dtype: torch.dtype) -> tuple[LayerWeights, NextWeights]:
    def norm() -> Tensor:
        return (1 + 0.1 * torch.randn(HIDDEN, device="cuda")).to(dtype)

    weights = LayerWeights(
        output=random_rows(HIDDEN, HIDDEN),
        norm=norm(),
        gate_up=random_rows(2 * INTERMEDIATE, HIDDEN),
        down=random_rows(HIDDEN, INTERMEDIATE),
    )
    return weights, NextWeights(norm(), random_rows(QKV, HIDDEN))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("num_tokens", [1, 7, 9, 16, 17, 31, 32, 33, 64])
def test_a_layer(num_tokens: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weights, following = random_layer(dtype)
    assert joins_products(weights, following, num_tokens, dtype)
    size = (max(LEAST_COMPARED, num_tokens), HIDDEN)
    for given in (following, None, following):
        attended = torch.randn(size, device="cuda", dtype=dtype)
        start = torch.randn(size, device="cuda", dtype=dtype)
        stream, wanted = start.clone(), start.clone()
        # A part of `stream` is added to in place.
        parts = zip(attended.split(num_tokens), stream.split(num_tokens), strict=True)
        found = [joined_products(x, part, weights, given, EPS) for x, part in parts]
        wanted_qkv = joined_products_reference(attended, wanted, weights, given, EPS)
        assert relative_error(stream - start, wanted - start) < ADDED_ERROR
        qkv = [each for each in found if each is not None]
        assert len(qkv) == (0 if given is None else len(found))
        if wanted_qkv is not None:
            assert relative_error(torch.cat(qkv), wanted_qkv) < QKV_ERROR


@pytest.mark.parametrize("num_tokens", [1, 7, 16, 64])
def test_in_a_graph_each_replay_is_the_same(num_tokens: int) -> None:
    """Nobody adds parts up, so sums have one order; and counters are left as they were found."""
    torch.manual_seed(0)
    layers = [random_layer(torch.bfloat16) for _ in range(NUM_LAYERS)]
    attended = torch.randn(num_tokens, HIDDEN, device="cuda", dtype=torch.bfloat16)
    start = torch.randn_like(attended)
    stream = start.clone()

    def run() -> Tensor | None:
        stream.copy_(start)
        qkv = None
        for weights, following in layers:
            # The next layer's queries stand for what attention would make of them.
            of_attention = attended if qkv is None else qkv[:, :HIDDEN].contiguous()
            qkv = joined_products(of_attention, stream, weights, following, EPS)
        return qkv

    wanted_qkv = run()
    assert wanted_qkv is not None
    wanted = stream.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        qkv = run()
    assert qkv is not None
    for _ in range(NUM_REPLAYS):
        graph.replay()
        assert torch.equal(stream, wanted)
        assert torch.equal(qkv, wanted_qkv)


@pytest.mark.parametrize("num_tokens", [1, 7, 9, 64])
def test_behind_one_another_as_with_a_pause_between(num_tokens: int) -> None:
    """The next kernel starts beside the end of the one before, which has the same counters."""
    torch.manual_seed(0)
    layers = [random_layer(torch.bfloat16) for _ in range(NUM_LAYERS)]
    attended = torch.randn(num_tokens, HIDDEN, device="cuda", dtype=torch.bfloat16)
    start = torch.randn_like(attended)

    def run(stream: Tensor, *, pauses: bool) -> list[Tensor | None]:
        found: list[Tensor | None] = []
        for weights, following in layers * 3:
            found.append(joined_products(attended, stream, weights, following, EPS))
            if pauses:
                torch.cuda.synchronize()
        return found

    wanted_stream = start.clone()
    wanted = run(wanted_stream, pauses=True)
    for _ in range(NUM_REPLAYS):
        stream = start.clone()
        for actual, expected in zip(run(stream, pauses=False), wanted, strict=True):
            assert actual is not None
            assert expected is not None
            assert torch.equal(actual, expected)
        assert torch.equal(stream, wanted_stream)
