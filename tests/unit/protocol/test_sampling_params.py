"""Sampling parameters are checked where they enter, and the error names the field."""

import math

import pytest

from protocol.errors import InvalidRequestError
from protocol.sampling import SamplingParams


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n", 0),
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_p", math.nan),
        ("top_k", -2),
        ("min_p", 1.5),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", math.nan),
        ("repetition_penalty", math.inf),
        ("presence_penalty", 2.5),
        ("frequency_penalty", -2.5),
        ("seed", 2**63),
        ("max_tokens", 0),
        ("min_tokens", -1),
        ("logprobs", 21),
        ("stop", ("",)),
        ("logit_bias", {1: math.nan}),
        ("logit_bias", {1: 101.0}),
        ("logit_bias", {-1: 1.0}),
    ],
)
def test_out_of_range_names_the_field(field: str, value: object) -> None:
    with pytest.raises(InvalidRequestError, match=f"`{field}`") as caught:
        SamplingParams(**{field: value}).validate()  # type: ignore[arg-type]
    assert caught.value.field == field


def test_min_tokens_must_fit_into_max_tokens() -> None:
    with pytest.raises(InvalidRequestError) as caught:
        SamplingParams(min_tokens=5, max_tokens=4).validate()
    assert caught.value.field == "min_tokens"


def test_defaults_and_limits_are_valid() -> None:
    SamplingParams().validate()
    SamplingParams(temperature=0.0, top_k=-1, max_tokens=None, logprobs=20).validate()
