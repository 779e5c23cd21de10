"""Filters and penalties: the wrapper against the reference and both against a sort."""

import pytest
import torch
from filter_cases import ROWS
from torch import Tensor

from kernels.sampling import (
    filter_weights,
    filter_weights_reference,
    penalize,
    penalize_reference,
    rule_out,
    rule_out_reference,
)

WIDTHS = [5, 256, 1000, 49_152]


def make_weights(width: int, *, spread: float, ties: bool) -> Tensor:
    generator = torch.Generator().manual_seed(width)
    logits = spread * torch.randn(len(ROWS), width, generator=generator)
    if ties:
        logits = logits.bfloat16().float()
    return (logits - logits.amax(-1, keepdim=True)).exp()


def kept_by_sorting(row: Tensor, top_k: int, top_p: float, min_p: float) -> Tensor:
    row = torch.where(row >= min_p, row, 0.0)
    ranked = row.double().sort(descending=True).values
    floor = 0.0
    if top_k:
        ranked = ranked[:top_k]
        floor = float(ranked[-1])
    if top_p < 1.0:
        ends = ranked.cumsum(0)
        wanted = torch.tensor(top_p, dtype=torch.float32).double() * ends[-1]
        floor = max(floor, float(ranked[int((ends < wanted).sum())]))
    return torch.where(row.double() >= floor, row, 0.0)


@pytest.mark.parametrize("implementation", [filter_weights, filter_weights_reference])
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("spread", [0.3, 5.0])
@pytest.mark.parametrize("width", WIDTHS)
def test_filters_keep_what_sorting_would(implementation, width, spread, ties):
    weights = make_weights(width, spread=spread, ties=ties)
    top_k, top_p, min_p = (torch.tensor(column) for column in zip(*ROWS, strict=True))
    expected = torch.stack(
        [kept_by_sorting(row, *options) for row, options in zip(weights, ROWS, strict=True)]
    )
    actual = implementation(weights.clone(), top_k=top_k, top_p=top_p, min_p=min_p)
    assert torch.equal(actual, expected)
    alone = [
        implementation(
            weights[i : i + 1].clone(),
            top_k=top_k[i : i + 1],
            top_p=top_p[i : i + 1],
            min_p=min_p[i : i + 1],
        )
        for i in range(len(ROWS))
    ]
    assert torch.equal(torch.cat(alone), expected)


@pytest.mark.parametrize("implementation", [filter_weights, filter_weights_reference])
def test_without_min_p_and_with_a_known_largest_top_k(implementation):
    weights = make_weights(1000, spread=2.0, ties=False)
    top_k = torch.arange(1, len(ROWS) + 1)
    top_p = torch.ones(len(ROWS))
    actual = implementation(weights.clone(), top_k=top_k, top_p=top_p, min_p=None, max_top_k=13)
    assert (actual > 0).sum(-1).tolist() == top_k.tolist()
    assert torch.equal(actual, torch.where(actual > 0, weights, 0.0))


def test_filters_refuse_columns_of_another_length():
    with pytest.raises(ValueError, match="one contiguous value for a row"):
        filter_weights(
            torch.ones(3, 8),
            top_k=torch.zeros(2, dtype=torch.int64),
            top_p=torch.ones(3),
            min_p=None,
        )


@pytest.mark.parametrize("implementation", [penalize, penalize_reference])
@pytest.mark.parametrize("vocab_size", [7, 1000])
def test_penalties_follow_the_formula(implementation, vocab_size):
    generator = torch.Generator().manual_seed(1)
    scores = 4 * torch.randn(5, vocab_size + 3, generator=generator)
    counts = torch.randint(0, 3, (6, vocab_size), generator=generator, dtype=torch.int32)
    in_prompt = torch.rand(6, vocab_size, generator=generator) < 0.3
    places, slots = torch.tensor([4, 0, 2]), torch.tensor([1, 5, 3])
    repetition = torch.tensor([1.0, 1.3, 0.8])
    presence = torch.tensor([0.5, 0.0, -1.0])
    frequency = torch.tensor([0.0, -0.4, 1.1])
    expected = scores.double()
    for i, (place, slot) in enumerate(zip(places.tolist(), slots.tolist(), strict=True)):
        for token in range(vocab_size):
            score, count = float(expected[place, token]), int(counts[slot, token])
            if count or in_prompt[slot, token]:
                score = score / repetition[i] if score > 0 else score * repetition[i]
            score -= frequency[i] * count + presence[i] * (count > 0)
            expected[place, token] = score
    implementation(
        scores,
        places=places,
        slots=slots,
        output_counts=counts,
        in_prompt=in_prompt,
        repetition=repetition,
        presence=presence,
        frequency=frequency,
    )
    torch.testing.assert_close(scores.double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("implementation", [rule_out, rule_out_reference])
@pytest.mark.parametrize("width", [5, 32, 100, 160])
def test_only_what_is_allowed_keeps_its_score(implementation, width):
    generator = torch.Generator().manual_seed(2)
    scores = torch.randn(5, width, generator=generator)
    bits = torch.rand(3, 96, generator=generator) < 0.5
    bits[1, 32:64] = True
    places = torch.tensor([4, 0, 2])
    words = (bits.view(3, 3, 32).long() << torch.arange(32)).sum(-1)
    expected = scores.clone()
    for i, place in enumerate(places.tolist()):
        for token in range(width):
            if token >= 96 or not bits[i, token]:
                expected[place, token] = -torch.inf
    implementation(scores, places=places, allowed=words.to(torch.int32))
    assert torch.equal(scores, expected)


def test_masks_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="mask for a row"):
        rule_out(
            torch.zeros(2, 32),
            places=torch.tensor([0, 1]),
            allowed=torch.zeros(1, 1, dtype=torch.int32),
        )
