"""Thoughts that are ended in time, among rows that think as long as they like."""

import numpy as np
import pytest
import torch

from engine.sampler.sampler import Sampler
from engine.sequence import Sequence
from protocol.errors import InvalidRequestError
from protocol.ids import RequestKey
from protocol.request import Request
from protocol.sampling import SamplingParams, ThoughtLimit

VOCAB_SIZE, EOS, OPEN, CLOSE = 1000, 7, 100, 101
WORD = 500


def make_sampler() -> Sampler:
    return Sampler(
        vocab_size=VOCAB_SIZE, eos_token_ids=(EOS,), root_seed=0, device=torch.device("cpu")
    )


def make_sequence(
    limit: ThoughtLimit | None, outputs: tuple[int, ...] = (), **sampling: object
) -> Sequence:
    request = Request(
        key=RequestKey("r", 1),
        token_ids=[50, OPEN, *outputs],
        num_prompt_tokens=2,
        sampling=SamplingParams(**{"temperature": 0.0, "thoughts": limit, **sampling}),
    )
    return Sequence(request=request, root=b"", arrival_s=0.0)


def limit(max_tokens: int, *, starts_inside: bool = False) -> ThoughtLimit:
    return ThoughtLimit(
        max_tokens=max_tokens,
        opening_token_id=OPEN,
        closing_token_id=CLOSE,
        starts_inside=starts_inside,
    )


def generate(sequence: Sequence, wanted: list[int]) -> list[int]:
    """What comes where the model wants these tokens, one after another."""
    sampler = make_sampler()
    sampler.add(0, sequence)
    sampler.add(1, make_sequence(None))
    for token_id in wanted:
        logits = torch.zeros(2, VOCAB_SIZE)
        logits[:, token_id] = 100.0
        positions = np.array([sequence.num_output_tokens, 0])
        sampled, free = sampler.choose(logits, np.array([0, 1]), positions).read().token_ids
        assert free == token_id
        sequence.token_ids.append(sampled)
    return sequence.token_ids[2:]


CASES = [
    ("ended", limit(2), [OPEN, WORD, WORD, WORD, WORD], [OPEN, WORD, WORD, CLOSE, WORD]),
    (
        "ended by itself",
        limit(2),
        [OPEN, WORD, CLOSE, WORD, WORD, WORD],
        [OPEN, WORD, CLOSE, WORD, WORD, WORD],
    ),
    (
        "ended by itself just in time",
        limit(1),
        [OPEN, WORD, CLOSE, WORD, OPEN, WORD],
        [OPEN, WORD, CLOSE, WORD, OPEN, WORD],
    ),
    (
        "no thoughts",
        limit(2),
        [WORD, WORD, WORD, WORD, OPEN, WORD, WORD, WORD],
        [WORD, WORD, WORD, WORD, OPEN, WORD, WORD, WORD],
    ),
    ("none allowed", limit(0), [OPEN, WORD, WORD], [OPEN, CLOSE, WORD]),
    ("begun", limit(2, starts_inside=True), [WORD, WORD, WORD, WORD], [WORD, WORD, CLOSE, WORD]),
    (
        "begun again",
        limit(2, starts_inside=True),
        [OPEN, WORD, WORD, WORD],
        [OPEN, WORD, WORD, CLOSE],
    ),
    ("begun, none allowed", limit(0, starts_inside=True), [WORD, WORD], [CLOSE, WORD]),
    ("the output ends amid thoughts", limit(3), [OPEN, WORD, EOS], [OPEN, WORD, EOS]),
]


@pytest.mark.parametrize(
    ("held", "wanted", "expected"), [c[1:] for c in CASES], ids=[c[0] for c in CASES]
)
def test_thoughts_end_in_time(held: ThoughtLimit, wanted: list[int], expected: list[int]) -> None:
    assert generate(make_sequence(held), wanted) == expected


@pytest.mark.parametrize("num_known", range(5))
def test_a_sequence_that_comes_with_outputs_goes_on_behind_them(num_known: int) -> None:
    """As after a transfer or a preemption."""
    outputs = (OPEN, WORD, WORD, CLOSE, WORD)
    wanted = [OPEN, WORD, WORD, WORD, WORD][num_known:]
    assert generate(make_sequence(limit(2), outputs[:num_known]), wanted) == list(outputs)


@pytest.mark.parametrize(
    "sampling",
    [
        {"temperature": 1.0, "seed": 3},
        {"allowed_token_ids": (WORD, OPEN)},
        {"bad_words_token_ids": ((CLOSE,),)},
        {"stop_token_ids": (CLOSE,), "min_tokens": 9},
        {"repetition_penalty": 1.5},
    ],
    ids=str,
)
def test_nothing_else_that_is_asked_for_prolongs_thoughts(sampling: dict[str, object]) -> None:
    sequence = make_sequence(limit(2), **sampling)
    assert generate(sequence, [OPEN, WORD, WORD, WORD]) == [OPEN, WORD, WORD, CLOSE]


def test_a_closing_token_that_the_model_does_not_have_ends_nothing() -> None:
    foreign = ThoughtLimit(max_tokens=0, opening_token_id=OPEN, closing_token_id=VOCAB_SIZE)
    assert generate(make_sequence(foreign), [OPEN, WORD, WORD]) == [OPEN, WORD, WORD]


def test_no_limit_is_below_zero() -> None:
    with pytest.raises(InvalidRequestError) as refusal:
        SamplingParams(thoughts=limit(-1)).validate()
    assert refusal.value.field == "thoughts"
