"""When a sequence ends, and which steps its phases allow."""

import pytest

from engine.phase import Phase, PhaseError, PhaseEvent, advance
from engine.scheduler.config import SchedulerConfig
from engine.scheduler.progress import StopRules
from engine.sequence import Sequence
from protocol.block_hash import root_hash
from protocol.ids import RequestKey
from protocol.request import Request
from protocol.sampling import SamplingParams

EOS = 2
RULES = StopRules(frozenset({EOS, 3}), max_model_len=20)


def make_sequence(
    sampling: SamplingParams, *, num_prompt: int = 4, num_output: int = 0
) -> Sequence:
    request = Request(
        key=RequestKey("r", 0),
        token_ids=[9] * (num_prompt + num_output),
        num_prompt_tokens=num_prompt,
        sampling=sampling,
    )
    return Sequence(request, root_hash("m"), arrival_s=0.0)


def end_of(sampling: SamplingParams, token_id: int, *, num_output: int = 0) -> object:
    update = RULES.append(make_sequence(sampling, num_output=num_output), [token_id])
    assert update.new_token_ids == [token_id]
    return update.finish_reason, update.stop_token_id


def test_ends_of_sequence_stop_without_a_stop_token_id() -> None:
    assert end_of(SamplingParams(), EOS) == ("stop", None)
    assert end_of(SamplingParams(), 3) == ("stop", None)
    assert end_of(SamplingParams(), 5) == (None, None)


def test_ignore_eos_ignores_them() -> None:
    assert end_of(SamplingParams(ignore_eos=True), EOS) == (None, None)


def test_a_stop_token_is_named() -> None:
    sampling = SamplingParams(stop_token_ids=(5, 6), ignore_eos=True)
    assert end_of(sampling, 6) == ("stop", 6)
    assert end_of(SamplingParams(stop_token_ids=(EOS,), ignore_eos=True), EOS) == ("stop", EOS)


def test_nothing_stops_before_min_tokens() -> None:
    sampling = SamplingParams(min_tokens=3, stop_token_ids=(5,))
    for token_id in (EOS, 5):
        reasons = [end_of(sampling, token_id, num_output=n) for n in range(3)]
        assert [reason is not None for reason, _ in reasons] == [False, False, True]


def test_stop_goes_before_length() -> None:
    assert end_of(SamplingParams(max_tokens=1), EOS) == ("stop", None)
    assert end_of(SamplingParams(max_tokens=1), 5) == ("length", None)


def test_max_tokens_counts_output_that_came_with_the_request() -> None:
    sampling = SamplingParams(max_tokens=3)
    assert end_of(sampling, 5, num_output=1) == (None, None)
    assert end_of(sampling, 5, num_output=2) == ("length", None)


@pytest.mark.parametrize("max_tokens", [None, 1000])
def test_the_models_length_ends_it(max_tokens: int | None) -> None:
    sampling = SamplingParams(max_tokens=max_tokens, min_tokens=0)
    assert end_of(sampling, 5, num_output=14) == (None, None)
    assert end_of(sampling, 5, num_output=15) == ("length", None)


def test_tokens_behind_the_end_are_dropped() -> None:
    sequence = make_sequence(SamplingParams())
    update = RULES.append(sequence, [5, EOS, 7])
    assert update.new_token_ids == [5, EOS]
    assert sequence.token_ids[4:] == [5, EOS]


def test_every_phase_leads_to_the_end() -> None:
    ends: dict[Phase, set[Phase]] = {}
    for phase in Phase:
        ends[phase] = set()
        for event in PhaseEvent:
            try:
                ends[phase].add(advance(phase, event))
            except PhaseError:
                continue
    reaching = {Phase.FINISHED}
    while more := {p for p, following in ends.items() if following & reaching} - reaching:
        reaching |= more
    assert reaching == set(Phase)
    assert ends[Phase.FINISHED] == set()


def test_an_impossible_event_names_both() -> None:
    with pytest.raises(PhaseError, match="retain can't happen to a waiting sequence"):
        advance(Phase.WAITING, PhaseEvent.RETAIN)


@pytest.mark.parametrize("name", ["max_num_seqs", "max_num_batched_tokens", "max_model_len"])
def test_limits_below_one_are_refused(name: str) -> None:
    limits = {"max_num_seqs": 1, "max_num_batched_tokens": 1, "max_model_len": 1, name: 0}
    with pytest.raises(ValueError, match=name):
        SchedulerConfig(**limits)
