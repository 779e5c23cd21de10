"""Triton's sampling kernels against the references: compiled on a GPU, else in the interpreter."""

import pytest
import torch
from filter_cases import ROWS
from torch import Tensor
from triton_cases import DEVICE, needs_triton

from kernels.choice import Filters, choose_tokens_reference
from kernels.gpu import choice, scores
from kernels.gpu.filters import filter_weights
from kernels.sampling import filter_weights_reference, penalize_reference, rule_out_reference

pytestmark = needs_triton
WIDTHS = [5, 256, 4500] + ([49_152, 128_256] if DEVICE == "cuda" else [])
GREEDY = {"temperature": None, "uniforms": None, "filters": None}


def make_scores(width: int, *, spread: float = 3.0, ties: bool = False) -> Tensor:
    generator = torch.Generator().manual_seed(width)
    drawn = spread * torch.randn(len(ROWS), width, generator=generator)
    return drawn.bfloat16().float() if ties else drawn


def make_weights(width: int, *, spread: float, ties: bool) -> Tensor:
    drawn = make_scores(width, spread=spread, ties=ties)
    return (drawn - drawn.amax(-1, keepdim=True)).exp()


def filters() -> dict[str, Tensor]:
    top_k, top_p, min_p = (torch.tensor(column) for column in zip(*ROWS, strict=True))
    return {"top_k": top_k, "top_p": top_p, "min_p": min_p}


def on_device(columns: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: column.to(DEVICE) for name, column in columns.items()}


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("spread", [0.3, 5.0])
@pytest.mark.parametrize("width", WIDTHS)
def test_filters_keep_what_the_reference_does(width: int, spread: float, *, ties: bool) -> None:
    weights = make_weights(width, spread=spread, ties=ties)
    expected = filter_weights_reference(weights.clone(), **filters())
    actual = filter_weights(weights.to(DEVICE, copy=True), **on_device(filters()))
    assert torch.equal(actual.cpu(), expected)
    alone = filter_weights(
        weights[3:4].to(DEVICE, copy=True),
        **on_device({name: column[3:4] for name, column in filters().items()}),
    )
    assert torch.equal(alone.cpu(), expected[3:4])


@pytest.mark.parametrize("top_k", [0, 7, 200])
def test_filters_with_fewer_weights_than_top_k_and_without_min_p(top_k: int) -> None:
    weights = make_weights(1000, spread=2.0, ties=False)
    weights[:, 2:990] = 0.0
    columns = {**filters(), "top_k": torch.full((len(ROWS),), top_k), "min_p": None}
    expected = filter_weights_reference(weights.clone(), **columns)
    columns = {name: None if x is None else x.to(DEVICE) for name, x in columns.items()}
    actual = filter_weights(weights.to(DEVICE, copy=True), **columns)
    assert torch.equal(actual.cpu(), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", WIDTHS)
class TestChoice:
    def test_the_largest(self, width: int, dtype: torch.dtype) -> None:
        drawn = make_scores(width).to(dtype)
        drawn[0] = 1.0
        drawn[1, width // 2 :] = drawn.amax() + 1
        expected = drawn.argmax(-1)
        expected[0], expected[1] = 0, width // 2
        assert torch.equal(choice.choose_tokens(drawn.to(DEVICE), **GREEDY).cpu(), expected)

    @pytest.mark.parametrize("is_filtered", [False, True])
    def test_by_random_numbers(self, width: int, dtype: torch.dtype, *, is_filtered: bool) -> None:
        drawn = make_scores(width).to(dtype)
        drawn[3, width // 2 :] = -torch.inf
        generator = torch.Generator().manual_seed(1)
        temperature = 0.2 + 2 * torch.rand(len(ROWS), generator=generator)
        temperature[::5] = 0.0
        uniforms = torch.rand(len(ROWS), dtype=torch.float64, generator=generator)
        uniforms[1], uniforms[8] = 0.0, 0.5
        expected = choose_tokens_reference(
            drawn.clone(),
            temperature=temperature,
            uniforms=uniforms,
            filters=Filters(**filters()) if is_filtered else None,
        )

        def choose(rows: slice) -> Tensor:
            kept = Filters(**on_device({name: x[rows] for name, x in filters().items()}))
            return choice.choose_tokens(
                drawn[rows].to(DEVICE),
                temperature=temperature[rows].to(DEVICE),
                uniforms=uniforms[rows].to(DEVICE),
                filters=kept if is_filtered else None,
            ).cpu()

        assert torch.equal(choose(slice(None)), expected)
        assert torch.equal(choose(slice(4, 5)), expected[4:5])


@pytest.mark.parametrize("uniform", [0.0, 1.0 - 2.0**-53])
def test_what_has_no_weight_is_never_chosen(uniform: float) -> None:
    drawn = torch.full((2, 1500), -torch.inf)
    drawn[0, 700:703] = torch.tensor([1.0, 2.0, -200.0])
    drawn[1, :1400:100] = 1.0
    chosen = choice.choose_tokens(
        drawn.to(DEVICE),
        temperature=torch.ones(2, device=DEVICE),
        uniforms=torch.full((2,), uniform, dtype=torch.float64, device=DEVICE),
        filters=None,
    )
    assert chosen.tolist() == ([701, 1300] if uniform else [700, 0])


@pytest.mark.filterwarnings("ignore:.*NaN.*:RuntimeWarning", "ignore:.*invalid.*:RuntimeWarning")
def test_rows_that_are_all_ruled_out_or_nan_get_some_token() -> None:
    drawn = torch.stack([torch.full((300,), -torch.inf), torch.full((300,), torch.nan)])
    for temperature in (0.0, 1.0):
        chosen = choice.choose_tokens(
            drawn.to(DEVICE),
            temperature=torch.full((2,), temperature, device=DEVICE),
            uniforms=torch.full((2,), 0.5, dtype=torch.float64, device=DEVICE),
            filters=None,
        )
        assert all(0 <= token < 300 for token in chosen.tolist())


@pytest.mark.parametrize("vocab_size", [7, 3000])
def test_penalties(vocab_size: int) -> None:
    generator = torch.Generator().manual_seed(1)
    drawn = 4 * torch.randn(5, vocab_size + 3, generator=generator)
    columns = {
        "places": torch.tensor([4, 0, 2]),
        "slots": torch.tensor([1, 5, 3]),
        "output_counts": torch.randint(
            0, 3, (6, vocab_size), generator=generator, dtype=torch.int32
        ),
        "in_prompt": torch.rand(6, vocab_size, generator=generator) < 0.3,
        "repetition": torch.tensor([1.0, 1.3, 0.8]),
        "presence": torch.tensor([0.5, 0.0, -1.0]),
        "frequency": torch.tensor([0.0, -0.4, 1.1]),
    }
    actual = drawn.to(DEVICE, copy=True)
    scores.penalize(actual, **on_device(columns))
    penalize_reference(drawn, **columns)
    torch.testing.assert_close(actual.cpu(), drawn, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("width", [5, 32, 100, 1600])
def test_masks(width: int) -> None:
    generator = torch.Generator().manual_seed(2)
    drawn = torch.randn(5, width, generator=generator)
    allowed = torch.randint(-(2**31), 2**31, (3, 40), generator=generator, dtype=torch.int32)
    allowed[1] = -1
    places = torch.tensor([4, 0, 2])
    actual = drawn.to(DEVICE, copy=True)
    scores.rule_out(actual, places=places.to(DEVICE), allowed=allowed.to(DEVICE))
    rule_out_reference(drawn, places=places, allowed=allowed)
    assert torch.equal(actual.cpu(), drawn)
