"""On a GPU sampling waits for nothing, and a row's token doesn't depend on its neighbours."""

from collections.abc import Iterator

import pytest
import torch

from kernels.choice import choose_tokens, choose_tokens_reference
from kernels.sampling import filter_weights, penalize, rule_out

VOCAB_SIZE, BATCH = 128_256, 64


@pytest.fixture
def scores() -> torch.Tensor:
    torch.manual_seed(3)
    return 3 * torch.randn(BATCH, VOCAB_SIZE, device="cuda")


@pytest.fixture
def columns() -> dict[str, torch.Tensor]:
    """Rows with and without temperature and each filter, in turn."""
    index = torch.arange(BATCH, device="cuda")
    return {
        "temperature": 0.1 * (index % 16),
        "uniforms": torch.rand(BATCH, dtype=torch.float64, device="cuda"),
        "top_k": 50 * (index % 3),
        "top_p": torch.where(index % 5 > 2, 0.1 * (index % 10), 1.0),
        "min_p": 0.01 * (index % 2),
    }


@pytest.fixture
def _no_waiting() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


def test_the_reference_chooses_alike(
    scores: torch.Tensor, columns: dict[str, torch.Tensor]
) -> None:
    on_cpu = {name: column.cpu() for name, column in columns.items()}
    expected = choose_tokens_reference(scores.cpu(), **on_cpu)
    assert torch.equal(choose_tokens(scores, **columns).cpu(), expected)


def test_rows_are_independent(scores: torch.Tensor, columns: dict[str, torch.Tensor]) -> None:
    together = choose_tokens(scores, **columns)
    for i in range(0, BATCH, 7):
        alone = {name: column[i : i + 1].clone() for name, column in columns.items()}
        assert choose_tokens(scores[i : i + 1], **alone) == together[i]
    assert torch.equal(choose_tokens(scores, **columns), together)


@pytest.mark.usefixtures("_no_waiting")
def test_nothing_waits_for_the_device(
    scores: torch.Tensor, columns: dict[str, torch.Tensor]
) -> None:
    choose_tokens(scores, **columns)
    choose_tokens(scores.bfloat16())
    filters = {name: columns[name] for name in ("top_k", "top_p", "min_p")}
    filter_weights(torch.rand_like(scores), **filters)
    places = torch.arange(2, device="cuda")
    ones = torch.ones(2, device="cuda")
    penalize(
        scores,
        places=places,
        slots=places,
        output_counts=torch.zeros(2, VOCAB_SIZE, dtype=torch.int32, device="cuda"),
        in_prompt=torch.zeros(2, VOCAB_SIZE, dtype=torch.bool, device="cuda"),
        repetition=ones,
        presence=ones,
        frequency=ones,
    )
    rule_out(scores, places=places, allowed=torch.zeros(2, VOCAB_SIZE // 32, dtype=torch.int32))
