"""The rates that a worker measures of itself."""

import random

import pytest

from services.runtime.load_meter import LoadMeter


def decode_step(meter: LoadMeter, num_decoding: int, step_ms: float) -> None:
    meter.observe_step(step_ms / 1e3, num_prefill_tokens=0, num_decoding=num_decoding)


def test_rates_start_with_the_first_step_and_follow_later_ones() -> None:
    meter = LoadMeter()
    assert meter.decode_ms_per_step is None
    decode_step(meter, 1, 10.0)
    assert meter.decode_ms_per_step == pytest.approx(10.0)
    for _ in range(50):
        decode_step(meter, 1, 20.0)
    assert meter.decode_ms_per_step == pytest.approx(20.0, rel=0.01)


def test_a_mixed_step_tells_prefills_part() -> None:
    meter = LoadMeter()
    decode_step(meter, 4, 10.0)
    meter.observe_step(0.110, num_prefill_tokens=200, num_decoding=4)
    assert meter.prefill_ms_per_token == pytest.approx(0.5)
    meter.observe_step(0.001, num_prefill_tokens=1, num_decoding=0)
    assert meter.prefill_ms_per_token == pytest.approx(0.5), "too small a chunk to tell"


def test_a_further_sequences_cost_is_the_slope_over_batch_sizes() -> None:
    meter = LoadMeter()
    rng = random.Random(0)
    for _ in range(200):
        num_decoding = rng.randint(1, 32)
        decode_step(meter, num_decoding, 6.0 + 0.25 * num_decoding)
    assert meter.decode_ms_per_sequence == pytest.approx(0.25, rel=0.01)


def test_a_constant_batch_tells_no_slope_and_keeps_the_last() -> None:
    meter = LoadMeter()
    for _ in range(50):
        decode_step(meter, 8, 10.0)
    assert meter.decode_ms_per_sequence is None
    for num_decoding in (1, 8, 16, 4):
        decode_step(meter, num_decoding, 6.0 + 0.5 * num_decoding)
    measured = meter.decode_ms_per_sequence
    assert measured is not None
    for step_ms in (7.0, 9.0) * 100:
        decode_step(meter, 4, step_ms)
    assert meter.decode_ms_per_sequence == pytest.approx(measured, abs=0.1)
