"""Allowed tokens and bad words, among rows that are free."""

import numpy as np
import torch

from engine.sampler.sampler import Sampler
from engine.sequence import Sequence
from protocol.ids import RequestKey
from protocol.request import Request
from protocol.sampling import SamplingParams

VOCAB_SIZE, EOS = 1000, 7


def make_sampler() -> Sampler:
    return Sampler(
        vocab_size=VOCAB_SIZE, eos_token_ids=(EOS,), root_seed=0, device=torch.device("cpu")
    )


def make_sequence(outputs: list[int], **sampling: object) -> Sequence:
    request = Request(
        key=RequestKey("r", 1),
        token_ids=[50, 51, *outputs],
        num_prompt_tokens=2,
        sampling=SamplingParams(temperature=0.0, **sampling),
    )
    return Sequence(request=request, root=b"", arrival_s=0.0)


def ranked(*token_ids: int) -> torch.Tensor:
    """Logits by which these come first, in this order."""
    logits = torch.zeros(VOCAB_SIZE)
    for rank, token_id in enumerate(token_ids):
        logits[token_id] = 100.0 - rank
    return logits


def sample(sampler: Sampler, *logits: torch.Tensor) -> list[int]:
    rows = np.arange(len(logits))
    positions = np.zeros(len(logits), dtype=int)
    return sampler.choose(torch.stack(logits), rows, positions).read().token_ids


def test_only_allowed_tokens_and_the_end_are_chosen() -> None:
    sampler = make_sampler()
    sampler.add(0, make_sequence([], allowed_token_ids=(31, 32, 999)))
    sampler.add(1, make_sequence([]))
    sampler.add(2, make_sequence([], allowed_token_ids=(5,)))
    sampler.add(3, make_sequence([], allowed_token_ids=(5,), ignore_eos=True))
    order = ranked(500, EOS, 999, 31, 5)
    assert sample(sampler, ranked(500, 999, EOS), order, order, order) == [999, 500, EOS, 5]


def test_bad_words_do_not_come() -> None:
    sampler = make_sampler()
    bad = ((10,), (20, 21), (30, 31, 32))
    sequences = [
        make_sequence(outputs, bad_words_token_ids=bad) for outputs in ([], [20], [30, 31])
    ]
    for row, sequence in enumerate(sequences):
        sampler.add(row, sequence)
    order = ranked(10, 21, 32, 99)
    assert sample(sampler, order, order, order) == [21, 32, 21]
    # The sequences go on: what is bad depends on where they are now.
    for sequence, token_id in zip(sequences, (21, 32, 20), strict=True):
        sequence.token_ids.append(token_id)
    assert sample(sampler, order, order, order) == [21, 21, 32]


def test_a_word_in_the_prompt_does_not_count() -> None:
    sampler = make_sampler()
    sampler.add(0, make_sequence([], bad_words_token_ids=((51, 60),)))
    assert sample(sampler, ranked(60, 61)) == [60]


def test_nothing_left_is_the_end() -> None:
    sampler = make_sampler()
    sampler.add(
        0,
        make_sequence([], allowed_token_ids=(5,), bad_words_token_ids=((5,),), ignore_eos=True),
    )
    assert sample(sampler, ranked(5, 6)) == [EOS]
