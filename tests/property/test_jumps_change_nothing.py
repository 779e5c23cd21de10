"""Outputs with jumps over forced tokens are those without, token by token, however steps go."""

import functools
import itertools
from pathlib import Path
from typing import Any, TypeAlias

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_llama import write_tiny_llama

from engine import LLM, SamplingParams, StructuredOutputsParams
from engine.outputs import RequestOutput
from engine.runner import ModelRunner
from engine.running_step import RunningStep
from engine.scheduler.plan import StepPlan

Request: TypeAlias = tuple[int, StructuredOutputsParams | None, dict[str, Any]]
"""Tokens of the prompt, what the output is held to, and how it's sampled."""

FEW_BLOCKS = {"num_gpu_blocks_override": 10, "max_num_batched_tokens": 24}
SWAPPING = FEW_BLOCKS | {"preemption_mode": "swap", "swap_space": 0.01}
WORKERS: dict[str, dict[str, Any]] = {
    "one by one": {},
    "steps ahead": {"async_scheduling": True},
    "preempting": FEW_BLOCKS,
    "preempting, steps ahead": {**FEW_BLOCKS, "async_scheduling": True},
    "swapping": SWAPPING,
    "swapping, steps ahead, no cache": {
        **SWAPPING,
        "async_scheduling": True,
        "enable_prefix_caching": False,
    },
    "small chunks": {"max_num_batched_tokens": 5, "block_size": 4},
    "small chunks, steps ahead": {
        "max_num_batched_tokens": 5,
        "block_size": 4,
        "async_scheduling": True,
    },
}

# This model's choices are nearly even: among all tokens, a random number falls between two often
# enough for other chunks' rounding errors to show.
DEFAULTS = {"top_k": 20}
KEYS = ("id", "customer_name", "is_returning_customer", "größe", "last purchase, in days")
VALUES: tuple[dict[str, Any], ...] = (
    {"type": "boolean"},
    {"type": "null"},
    {"enum": ["preferred delivery", "pick-up", 3]},
    {"const": "日本語 as it is"},
    {"type": "integer", "minimum": 0, "maximum": 999},
    {"type": "string", "pattern": "^[a-d]{2,6}$"},
)


def schema(properties: dict[str, dict[str, Any]]) -> StructuredOutputsParams:
    return StructuredOutputsParams(
        json={
            "type": "object",
            "properties": properties,
            "required": list(properties),
            "additionalProperties": False,
        }
    )


grammars = st.one_of(
    st.dictionaries(st.sampled_from(KEYS), st.sampled_from(VALUES), min_size=1, max_size=4).map(
        schema
    ),
    st.sampled_from(
        [
            StructuredOutputsParams(regex="(yes|no), because of this|never mind(, really)*"),
            StructuredOutputsParams(choice=("left turn ahead", "left turns", "right turn ahead")),
            StructuredOutputsParams(grammar='root ::= "I know " ("that " | "nothing ") "at all."'),
        ]
    ),
)
samplings = st.fixed_dictionaries(
    {"temperature": st.sampled_from([0.0, 0.7, 1.5]), "max_tokens": st.integers(1, 60)},
    optional={
        "seed": st.integers(0, 9),
        "n": st.integers(1, 3),
        "min_tokens": st.just(1) | st.integers(0, 12),
        "stop": st.sampled_from([["true"], ["at", "er"], [": "]]),
        "include_stop_str_in_output": st.booleans(),
        "stop_token_ids": st.lists(st.integers(17, 400), max_size=40),
        "ignore_eos": st.booleans(),
        "repetition_penalty": st.floats(0.5, 2.0),
        "frequency_penalty": st.floats(-1.0, 1.0),
        "logit_bias": st.just({28: 4.0, 95: -3.0}),
        "bad_words_token_ids": st.just(((28, 451), (314,))),
        "top_p": st.floats(0.3, 1.0),
        "logprobs": st.integers(0, 2),
    },
)
requests = st.tuples(
    st.integers(1, 40),
    st.none() | grammars | grammars | grammars,
    samplings.map(lambda each: {**each, "min_tokens": min(each.get("min_tokens", 0), 1)})
    | samplings.filter(lambda each: each.get("min_tokens", 0) <= each["max_tokens"]),
)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("model"))


@functools.lru_cache
def make_llm(model_dir: Path, name: str, *, jump_ahead: bool) -> LLM:
    options = {"load_format": "dummy", "dtype": "float32", "num_threads": 1} | WORKERS[name]
    return LLM(str(model_dir), jump_ahead=jump_ahead, **options)


def outputs(llm: LLM, requests: list[Request]) -> list[RequestOutput]:
    answers = llm.generate(
        [{"prompt_token_ids": list(range(20, 20 + length))} for length, _, _ in requests],
        [
            SamplingParams(structured_outputs=grammar, **(DEFAULTS | {"seed": i} | sampling))
            for i, (_, grammar, sampling) in enumerate(requests)
        ],
        use_tqdm=False,
    )
    assert llm.engine.num_rows == 0
    assert llm.engine.pool.counts.referenced == 0
    assert llm._loop.scheduler.num_swapped == 0
    llm.engine.pool.check_integrity()
    return answers


def told(answers: list[RequestOutput]) -> list[Any]:
    """All that a request sees of its output; log-probabilities have rounding errors."""
    return [
        (
            each.token_ids,
            each.text,
            each.finish_reason,
            each.stop_reason,
            None if each.logprobs is None else [list(places) for places in each.logprobs],
        )
        for answer in answers
        for each in answer.outputs
    ]


@pytest.mark.parametrize("name", WORKERS)
@given(requests=st.lists(requests, min_size=1, max_size=5))
@settings(max_examples=15, deadline=None)
def test_same_outputs_and_no_block_left(
    model_dir: Path, name: str, requests: list[Request]
) -> None:
    expected = told(outputs(make_llm(model_dir, "one by one", jump_ahead=False), requests))
    jumping = make_llm(model_dir, name, jump_ahead=True)
    assert told(outputs(jumping, requests)) == expected
    # Once more, from the prefix cache.
    assert told(outputs(jumping, requests)) == expected


def with_a_say_in_what_is_forced(model_dir: Path) -> list[Request]:
    """Requests that something else than the grammar concerns, right where it forces tokens."""
    names = ["customer_name", "customer_number"]
    grammar = schema({"customer_name": {"type": "boolean"}, "name": {"enum": names}})
    [alone] = outputs(
        make_llm(model_dir, "one by one", jump_ahead=False), [(9, grammar, {"max_tokens": 60})]
    )
    token_ids = alone.outputs[0].token_ids
    forced = token_ids[3]
    text = alone.outputs[0].text
    more = {
        "stop token": {"stop_token_ids": [forced]},
        "stop token too early": {"stop_token_ids": [forced], "min_tokens": 6},
        "bad word": {"bad_words_token_ids": ((token_ids[2], forced),)},
        "allowed tokens": {"allowed_token_ids": sorted({*token_ids} - {forced})},
        "stop string": {"stop": [text[4:8]]},
        "stop string too early": {"stop": [text[4:8]], "min_tokens": 6},
        "length": {"max_tokens": 5},
        "logprobs": {"logprobs": 1},
        "forbidding": {"frequency_penalty": 2.0},
        "inviting": {"frequency_penalty": -2.0, "presence_penalty": -2.0},
        "least likely": {"logit_bias": {forced: -100.0}, "top_p": 0.1},
        "two": {"n": 2},
    }
    held = [(9 + i, grammar, {"max_tokens": 60} | each) for i, each in enumerate(more.values())]
    free = [(9, None, {"max_tokens": 30 + i, "ignore_eos": True}) for i in range(len(held) // 2)]
    return [*itertools.chain(*zip(held[::2], free, held[1::2], strict=True))]


@pytest.mark.parametrize("name", WORKERS)
def test_whoever_has_a_say_in_it_is_heard(model_dir: Path, name: str) -> None:
    requests = with_a_say_in_what_is_forced(model_dir)
    for temperature in (0.0, 1.0):
        for _, _, sampling in requests:
            sampling["temperature"] = temperature
        expected = outputs(make_llm(model_dir, "one by one", jump_ahead=False), requests)
        assert {output.outputs[0].finish_reason for output in expected} == {
            "stop",
            "length",
            "abort",
        }
        jumping = make_llm(model_dir, name, jump_ahead=True)
        assert told(outputs(jumping, requests)) == told(expected)


@pytest.mark.parametrize("name", WORKERS)
def test_jumps_save_steps(model_dir: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the cases above something is jumped over, and where it should be, someone is preempted."""
    grammar = schema(dict.fromkeys(KEYS, VALUES[0]))
    requests = [(length, grammar, {"max_tokens": 60}) for length in (1, 9, 16, 17, 30)]
    num_steps: list[int] = []
    for jump_ahead in (False, True):
        llm = make_llm(model_dir, name, jump_ahead=jump_ahead)
        plans: list[StepPlan] = []

        def noted(plan: StepPlan, llm: LLM = llm, plans: list[StepPlan] = plans) -> RunningStep:
            plans.append(plan)
            return ModelRunner.launch(llm.engine._runner, plan)

        with monkeypatch.context() as patch:
            patch.setattr(llm.engine._runner, "launch", noted)
            answers = outputs(llm, requests)
        assert all(answer.outputs[0].finish_reason == "stop" for answer in answers)
        num_steps.append(sum(bool(plan.scheduled) for plan in plans))
        if "num_gpu_blocks_override" in WORKERS[name]:
            assert any(plan.preempted for plan in plans)
    one_by_one, jumping = num_steps
    assert jumping < one_by_one
    if name in ("one by one", "steps ahead"):
        assert jumping < one_by_one / 2
