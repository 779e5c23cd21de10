"""The sampler against straightforward implementations, and alone against in a batch."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from engine.sampler.pending import SampledRows
from engine.sampler.sampler import Sampler
from engine.sequence import Sequence
from protocol.ids import RequestKey
from protocol.request import Request, TokenLogprobs
from protocol.sampling import SamplingParams

VOCAB_SIZE = 1000  # no multiple of the sampler's chunk
EOS = 7


def make_sampler(vocab_size: int = VOCAB_SIZE) -> Sampler:
    return Sampler(
        vocab_size=vocab_size, eos_token_ids=(EOS,), root_seed=0, device=torch.device("cpu")
    )


def make_sequence(
    sampling: SamplingParams, *, outputs: tuple[int, ...] = (), request_id: str = "r"
) -> Sequence:
    prompt = [1, 2, 3, 2]
    request = Request(
        key=RequestKey(request_id, 1),
        token_ids=[*prompt, *outputs],
        num_prompt_tokens=len(prompt),
        sampling=sampling,
    )
    return Sequence(request=request, root=b"", arrival_s=0.0)


def sample(sampler: Sampler, logits: Tensor, rows: list[int], positions: list[int]) -> SampledRows:
    return sampler.choose(logits, np.array(rows), np.array(positions)).read()


def sample_many(logits: Tensor, sampling: SamplingParams, count: int) -> Tensor:
    """Token at each of `count` output positions, all from the same `logits` [vocab_size]."""
    sampler = make_sampler(len(logits))
    sampler.add(0, make_sequence(sampling))
    rows = np.zeros(count, dtype=np.int64)
    drawn = sampler.choose(logits.expand(count, -1), rows, np.arange(count)).read()
    return torch.tensor(drawn.token_ids)


def random_logits(*shape: int, seed: int = 0) -> Tensor:
    return 3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_greedy_takes_the_first_of_the_largest() -> None:
    sampler = make_sampler()
    logits = random_logits(3, VOCAB_SIZE)
    logits[1, [400, 800]] = 50.0
    for row in range(3):
        sampler.add(row, make_sequence(SamplingParams(temperature=0.0)))
    sampled = sample(sampler, logits, [0, 1, 2], [0, 0, 0])
    assert sampled.token_ids == [int(logits[0].argmax()), 400, int(logits[2].argmax())]
    assert sampled.logprobs is None


WARPERS: dict[str, tuple[SamplingParams, list[Callable[..., Tensor]]]] = {
    "plain": (SamplingParams(), []),
    "cold": (SamplingParams(temperature=0.5), [TemperatureLogitsWarper(0.5)]),
    "hot": (SamplingParams(temperature=30.0), [TemperatureLogitsWarper(30.0)]),
    "top_k": (SamplingParams(top_k=5), [TopKLogitsWarper(5)]),
    "large_top_k": (
        SamplingParams(top_k=700, temperature=9.0),
        [TemperatureLogitsWarper(9.0), TopKLogitsWarper(700)],
    ),
    "top_p": (SamplingParams(top_p=0.7), [TopPLogitsWarper(0.7)]),
    # The nucleus holds most of the vocabulary, so candidates don't suffice.
    "hot_top_p": (
        SamplingParams(top_p=0.9, temperature=20.0),
        [TemperatureLogitsWarper(20.0), TopPLogitsWarper(0.9)],
    ),
    "min_p": (SamplingParams(min_p=0.1), [MinPLogitsWarper(0.1)]),
    "all": (
        SamplingParams(temperature=2.0, min_p=0.02, top_k=30, top_p=0.8),
        [
            TemperatureLogitsWarper(2.0),
            MinPLogitsWarper(0.02),
            TopKLogitsWarper(30),
            TopPLogitsWarper(0.8),
        ],
    ),
}


@pytest.mark.parametrize("name", WARPERS)
def test_tokens_follow_the_filtered_distribution(name: str) -> None:
    sampling, warpers = WARPERS[name]
    logits = random_logits(VOCAB_SIZE)
    warped = LogitsProcessorList(warpers)(torch.zeros(1, 1, dtype=torch.long), logits[None])
    expected = warped[0].double().softmax(-1)
    count = 20_000
    drawn = sample_many(logits, sampling, count)
    observed = torch.bincount(drawn, minlength=VOCAB_SIZE).double()
    assert observed[expected == 0].sum() == 0
    # Pearson's statistic over tokens expected at least five times, the others pooled; its mean is
    # the number of classes - 1 and its variance twice that. The seed is fixed: no chance here.
    frequent = expected * count >= 5
    classes = torch.cat([expected[frequent], expected[~frequent].sum()[None]]) * count
    counts = torch.cat([observed[frequent], observed[~frequent].sum()[None]])
    counts, classes = counts[classes > 1e-9], classes[classes > 1e-9]
    statistic = float(((counts - classes) ** 2 / classes).sum())
    freedom = len(classes) - 1
    assert statistic < freedom + 4 * (2 * freedom) ** 0.5


def test_a_token_of_probability_zero_is_never_drawn() -> None:
    logits = torch.full((VOCAB_SIZE,), -torch.inf)
    logits[[3, 500, 999]] = torch.tensor([0.0, 1.0, -20.0])
    assert set(sample_many(logits, SamplingParams(seed=1), 5000).tolist()) <= {3, 500, 999}


MIXED = [
    SamplingParams(temperature=0.0),
    SamplingParams(seed=1),
    SamplingParams(seed=2, top_k=1),
    SamplingParams(seed=2, top_k=40),
    SamplingParams(seed=3, top_p=0.9),
    SamplingParams(seed=3, top_p=0.95, temperature=25.0),
    SamplingParams(seed=4, top_k=300, top_p=0.5),
    SamplingParams(seed=5, min_p=0.05, logprobs=3),
    SamplingParams(seed=6, repetition_penalty=1.3, presence_penalty=0.5, logprobs=0),
    SamplingParams(temperature=0.0, frequency_penalty=1.5),
    SamplingParams(seed=8, logit_bias={5: 30.0, 9: -100.0}, logprobs=20),
    SamplingParams(seed=9, min_tokens=4, stop_token_ids=(11, 12)),
    SamplingParams(),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_alone_equals_the_row_in_a_batch(dtype: torch.dtype) -> None:
    """In bfloat16 equal logits abound: no tie may be broken by what else is in the batch."""
    vocab_size, steps = 49_152, 4
    logits = random_logits(steps, len(MIXED), vocab_size).to(dtype)
    sequences = [make_sequence(s, request_id=f"r{i}") for i, s in enumerate(MIXED)]
    together = make_sampler(vocab_size)
    for row, sequence in enumerate(sequences):
        together.add(row, sequence)
    order = list(reversed(range(len(MIXED))))
    batched = [sample(together, logits[t, order], order, [t] * len(order)) for t in range(steps)]
    for row, sequence in enumerate(sequences):
        alone = make_sampler(vocab_size)
        alone.add(0, sequence)
        place = order.index(row)
        for t in range(steps):
            single = sample(alone, logits[t, row : row + 1], [0], [t])
            assert single.token_ids[0] == batched[t].token_ids[place]
            if MIXED[row].logprobs is not None:
                assert single.logprobs is not None
                assert batched[t].logprobs is not None
                assert single.logprobs[0] == batched[t].logprobs[place]


def test_a_resumed_sequence_draws_the_tokens_it_would_have_drawn() -> None:
    """Another sampler (worker, attempt) that gets the output so far continues identically."""
    sampling = SamplingParams(seed=42, frequency_penalty=0.7, repetition_penalty=1.2, top_p=0.9)
    logits = random_logits(12, VOCAB_SIZE)
    first = make_sampler()
    first.add(3, make_sequence(sampling))
    whole = [sample(first, logits[t : t + 1], [3], [t]).token_ids[0] for t in range(12)]
    second = make_sampler()
    second.add(20, make_sequence(sampling, outputs=tuple(whole[:5])))
    rest = [sample(second, logits[t : t + 1], [20], [t]).token_ids[0] for t in range(5, 12)]
    assert rest == whole[5:]


def test_seeds_and_request_ids_name_the_random_stream() -> None:
    logits = random_logits(1, VOCAB_SIZE)

    def stream(sampling: SamplingParams, request_id: str) -> list[int]:
        sampler = make_sampler()
        sampler.add(0, make_sequence(sampling, request_id=request_id))
        return [sample(sampler, logits, [0], [t]).token_ids[0] for t in range(20)]

    seeded = SamplingParams(seed=-5, temperature=2.0)
    unseeded = SamplingParams(temperature=2.0)
    assert stream(seeded, "a") == stream(seeded, "b")
    assert stream(seeded, "a") != stream(SamplingParams(seed=5, temperature=2.0), "a")
    assert stream(unseeded, "a") == stream(unseeded, "a")
    assert stream(unseeded, "a") != stream(unseeded, "b")


def test_penalties_equal_a_reference() -> None:
    outputs = (5, 5, 9, 1)
    sampling = SamplingParams(
        temperature=0.0,
        repetition_penalty=1.5,
        presence_penalty=0.3,
        frequency_penalty=-0.2,
        logprobs=20,
    )
    sequence = make_sequence(sampling, outputs=outputs)
    plain = make_sequence(SamplingParams(temperature=0.0), request_id="plain")
    logits = random_logits(2, VOCAB_SIZE)
    ids = torch.tensor([sequence.token_ids])
    expected = RepetitionPenaltyLogitsProcessor(1.5)(ids, logits[1:].clone())[0]
    counts = torch.bincount(torch.tensor(outputs), minlength=VOCAB_SIZE)
    expected = expected - 0.3 * (counts > 0) + 0.2 * counts
    # Make one penalised token compete with the best unpenalised one, from both sides.
    for margin in (0.01, -0.01):
        best = max(float(expected[i]) for i in range(VOCAB_SIZE) if i not in sequence.token_ids)
        contested = logits.clone()
        contested[1, 5] = (best + margin + 0.3 - 0.4) * 1.5
        sampler = make_sampler()
        sampler.add(0, plain)
        sampler.add(1, sequence)
        sampled = sample(sampler, contested, [0, 1], [0, 4]).token_ids
        assert sampled[0] == int(logits[0].argmax())
        assert (sampled[1] == 5) is (margin > 0)


def test_penalty_slots_are_reused_clean() -> None:
    sampler = make_sampler()
    heavy = SamplingParams(temperature=0.0, presence_penalty=2.0)
    logits = torch.zeros(1, VOCAB_SIZE)
    logits[0, 50] = 1.0
    for request in range(9):
        sampler.add(0, make_sequence(heavy, request_id=str(request)))
        assert sample(sampler, logits, [0], [0]).token_ids == [50]
        assert sample(sampler, logits, [0], [1]).token_ids != [50]
        sampler.remove(0)


def test_logprobs_are_of_the_unadjusted_distribution() -> None:
    sampling = SamplingParams(
        temperature=0.3, seed=1, logprobs=4, logit_bias={17: 100.0}, presence_penalty=1.0
    )
    logits = random_logits(2, VOCAB_SIZE)
    sampler = make_sampler()
    sampler.add(0, make_sequence(SamplingParams()))
    sampler.add(1, make_sequence(sampling))
    sampled = sample(sampler, logits, [0, 1], [0, 0])
    assert sampled.token_ids[1] == 17
    assert sampled.logprobs is not None
    assert sampled.logprobs[0] is None
    logprobs = sampled.logprobs[1]
    assert logprobs is not None
    expected = logits[1].log_softmax(-1)
    top = expected.topk(4)
    assert logprobs.logprob == pytest.approx(float(expected[17]), abs=1e-5)
    assert logprobs.rank == int((expected > expected[17]).sum()) + 1
    assert logprobs.top_token_ids == top.indices.tolist()
    assert logprobs.top_logprobs == pytest.approx(top.values.tolist(), abs=1e-5)


def test_zero_logprobs_means_the_sampled_token_alone() -> None:
    sampler = make_sampler()
    sampler.add(0, make_sequence(SamplingParams(temperature=0.0, logprobs=0)))
    logits = random_logits(1, VOCAB_SIZE)
    sampled = sample(sampler, logits, [0], [0])
    assert sampled.logprobs == [
        TokenLogprobs(
            pytest.approx(float(logits.log_softmax(-1).max()), abs=1e-5),  # type: ignore[arg-type]
            1,
            [],
            [],
        )
    ]


def test_min_tokens_holds_back_eos_and_stop_ids() -> None:
    sampling = SamplingParams(
        temperature=0.0, min_tokens=2, stop_token_ids=(8, VOCAB_SIZE + 1), logprobs=0
    )
    sampler = make_sampler()
    sampler.add(0, make_sequence(sampling))
    sampler.add(1, make_sequence(SamplingParams(temperature=0.0, min_tokens=9, ignore_eos=True)))
    logits = torch.zeros(2, VOCAB_SIZE)
    logits[:, [EOS, 8, 30]] = torch.tensor([3.0, 2.0, 1.0])
    assert sample(sampler, logits, [0, 1], [1, 1]).token_ids == [30, EOS]
    assert sample(sampler, logits, [0, 1], [2, 2]).token_ids == [EOS, EOS]


def test_logit_bias_ignores_ids_outside_the_vocabulary() -> None:
    sampler = make_sampler()
    bias = {4: 20.0, VOCAB_SIZE: 100.0}
    sampler.add(0, make_sequence(SamplingParams(temperature=0.0, logit_bias=bias)))
    assert sample(sampler, torch.zeros(1, VOCAB_SIZE), [0], [0]).token_ids == [4]


def test_rows_may_change_between_steps() -> None:
    sampler = make_sampler()
    logits = random_logits(40, VOCAB_SIZE)
    greedy = logits.argmax(-1).tolist()
    sampler.add(0, make_sequence(SamplingParams(seed=1, temperature=5.0)))
    sample(sampler, logits[:1], [0], [0])
    sampler.remove(0)
    for row in range(40):
        sampler.add(row, make_sequence(SamplingParams(temperature=0.0), request_id=str(row)))
    assert sample(sampler, logits, list(range(40)), [0] * 40).token_ids == greedy
    assert sample(sampler, logits[[7, 3]], [7, 3], [1, 1]).token_ids == [greedy[7], greedy[3]]
