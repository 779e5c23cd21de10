"""On a GPU sampling waits for nothing, and a row's token doesn't depend on its neighbours."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from kernels.choice import Filters, choose_tokens, choose_tokens_reference
from kernels.sampling import filter_weights, penalize, rule_out

VOCAB_SIZE, BATCH = 128_256, 64


@pytest.fixture
def scores() -> torch.Tensor:
    torch.manual_seed(3)
    return 3 * torch.randn(BATCH, VOCAB_SIZE, device="cuda")


def options(rows: slice = slice(None), device: str = "cuda") -> dict[str, Any]:
    """Rows with and without temperature and each filter, in turn; of those `rows`."""
    torch.manual_seed(4)
    index = torch.arange(BATCH)
    columns = {
        "temperature": 0.1 * (index % 16),
        "uniforms": torch.rand(BATCH, dtype=torch.float64),
        "top_k": 50 * (index % 3),
        "top_p": torch.where(index % 5 > 2, 0.1 * (index % 10), 1.0),
        "min_p": 0.01 * (index % 2),
    }
    columns = {name: column[rows].to(device) for name, column in columns.items()}
    filters = Filters(**{name: columns.pop(name) for name in ("top_k", "top_p", "min_p")})
    return {**columns, "filters": filters}


@contextmanager
def no_waiting() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_reference_chooses_alike(scores: torch.Tensor) -> None:
    expected = choose_tokens_reference(scores.cpu(), **options(device="cpu"))
    assert torch.equal(choose_tokens(scores, **options()).cpu(), expected)


def test_rows_are_independent(scores: torch.Tensor) -> None:
    together = choose_tokens(scores, **options())
    for i in range(0, BATCH, 7):
        rows = slice(i, i + 1)
        assert choose_tokens(scores[rows], **options(rows)) == together[i]
    assert torch.equal(choose_tokens(scores, **options()), together)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
def test_nothing_waits_for_the_device(scores: torch.Tensor) -> None:
    columns = options()
    filters: Filters = columns["filters"]
    weights = torch.rand_like(scores)
    with no_waiting():
        choose_tokens(scores, **columns)
        choose_tokens(scores.bfloat16())
        filter_weights(weights, top_k=filters.top_k, top_p=filters.top_p, min_p=filters.min_p)
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
