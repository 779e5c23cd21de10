"""Steps launched before the one before is known give the tokens that they'd give one by one."""

import itertools
from pathlib import Path
from typing import Any

import pytest
from tiny_llama import write_tiny_llama

from engine import LLM, SamplingParams, StructuredOutputsParams
from engine.outputs import RequestOutput
from engine.scheduler.plan import StepPlan
from protocol.sampling import ThoughtLimit

PROMPTS = [{"prompt_token_ids": list(range(3, 3 + length))} for length in (1, 9, 16, 17, 30, 40)]
DEFAULTS: dict[str, Any] = {"seed": 5, "max_tokens": 20, "ignore_eos": True}


def make_llm(model_dir: Path, **options: Any) -> LLM:
    defaults = {"load_format": "dummy", "dtype": "float32", "num_threads": 1}
    return LLM(str(model_dir), **(defaults | options))


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def one_by_one(model_dir: Path) -> LLM:
    return make_llm(model_dir)


@pytest.fixture(scope="module")
def ahead(model_dir: Path) -> LLM:
    return make_llm(model_dir, async_scheduling=True)


def plans_of(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> list[StepPlan]:
    """The steps that `llm` launches from now on."""
    plans: list[StepPlan] = []
    launch = llm.engine.launch

    def noted(plan: StepPlan):
        plans.append(plan)
        return launch(plan)

    monkeypatch.setattr(llm.engine, "launch", noted)
    return plans


def is_ahead(plan: StepPlan) -> bool:
    return any(item.source is not None for item in plan.scheduled)


def is_behind_another(plan: StepPlan) -> bool:
    return any(item.num_in_flight for item in plan.scheduled)


def outputs(llm: LLM, sampling: SamplingParams | list[SamplingParams]) -> list[RequestOutput]:
    answers = llm.generate(PROMPTS, sampling, use_tqdm=False)
    assert llm.engine.num_rows == 0
    assert llm.engine.pool.counts.referenced == 0
    llm.engine.pool.check_integrity()
    return answers


def told(answers: list[RequestOutput]) -> list[Any]:
    """All that a request sees of its output."""
    return [
        (each.token_ids, each.text, each.finish_reason, each.stop_reason, each.logprobs)
        for answer in answers
        for each in answer.outputs
    ]


SAMPLINGS = {
    "greedy": {"temperature": 0.0},
    "random": {},
    "filtered": {"top_p": 0.9, "top_k": 40, "min_p": 0.01},
    "penalties": {"repetition_penalty": 1.3, "frequency_penalty": 0.5, "presence_penalty": 0.5},
    "bias and least length": {"logit_bias": {7: 3.0}, "min_tokens": 5, "ignore_eos": False},
    "logprobs": {"logprobs": 3},
    "one token": {"max_tokens": 1},
    "two outputs": {"n": 2},
    "grammar": {"structured_outputs": StructuredOutputsParams(regex="(yes|no)+")},
    "grammar that ends": {
        "structured_outputs": StructuredOutputsParams(choice=["yes", "perhaps", "no way"]),
        "ignore_eos": False,
        "min_tokens": 1,
        "logit_bias": {7: 3.0},
        "repetition_penalty": 1.3,
    },
    "allowed tokens and bad words": {
        "allowed_token_ids": [5, 6, 7, 8],
        "bad_words_token_ids": ((5, 6), (7,)),
    },
    "limited thoughts": {
        "thoughts": ThoughtLimit(
            max_tokens=4, opening_token_id=11, closing_token_id=12, starts_inside=True
        )
    },
}


@pytest.mark.parametrize("options", SAMPLINGS.values(), ids=SAMPLINGS)
def test_same_output_and_the_device_never_waits(
    one_by_one: LLM, ahead: LLM, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    sampling = SamplingParams(**(DEFAULTS | options))
    expected = told(outputs(one_by_one, sampling))
    ahead.engine.pool.reset_cache()
    plans = plans_of(ahead, monkeypatch)
    answers = outputs(ahead, sampling)
    assert told(answers) == expected
    steps = [plan for plan in plans if plan.scheduled]
    # The prompts are one step; nothing runs behind a last token that is foreseen.
    assert all(is_ahead(plan) for plan in steps[1:])
    assert len(steps) >= max(len(each.outputs[0].token_ids) for each in answers)


def test_ends_that_nobody_foresaw(one_by_one: LLM, ahead: LLM) -> None:
    free = outputs(one_by_one, SamplingParams(**DEFAULTS))
    samplings = [
        SamplingParams(**(DEFAULTS | {"stop_token_ids": [answer.outputs[0].token_ids[at]]}))
        for at, answer in enumerate(free)
    ]
    expected = outputs(one_by_one, samplings)
    assert [len(answer.outputs[0].token_ids) for answer in expected] != [20] * len(PROMPTS)
    assert told(outputs(ahead, samplings)) == told(expected)
    texts = [
        SamplingParams(**(DEFAULTS | {"stop": answer.outputs[0].text[9:12]})) for answer in free
    ]
    assert told(outputs(ahead, texts)) == told(outputs(one_by_one, texts))


def test_few_blocks_and_places(model_dir: Path, one_by_one: LLM) -> None:
    tight = make_llm(
        model_dir,
        async_scheduling=True,
        num_gpu_blocks_override=11,
        max_num_seqs=3,
        max_num_batched_tokens=24,
    )
    sampling = SamplingParams(**(DEFAULTS | {"max_tokens": 40}))
    assert told(outputs(tight, sampling)) == told(outputs(one_by_one, sampling))
    assert tight._loop.scheduler.stats.num_preemptions > 0


def test_chunks_of_prompts_run_ahead_of_each_other_and_of_tokens(
    model_dir: Path, one_by_one: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    chunked = make_llm(model_dir, async_scheduling=True, max_num_batched_tokens=24)
    plans = plans_of(chunked, monkeypatch)
    sampling = SamplingParams(**DEFAULTS)
    assert told(outputs(chunked, sampling)) == told(outputs(one_by_one, sampling))
    items = [item for plan in plans for item in plan.scheduled]
    assert any(item.num_new_tokens > 1 and item.num_in_flight > 1 for item in items)
    # No step but the first one waited for the one before it.
    starts = [plan for plan in plans if plan.scheduled and not is_behind_another(plan)]
    assert starts == plans[:1]


def test_what_is_asked_of_a_chunked_prompt(model_dir: Path, one_by_one: LLM) -> None:
    """Its chunks are read in the order in which they run, whatever is launched by then."""
    chunked = make_llm(model_dir, async_scheduling=True, max_num_batched_tokens=24)
    sampling = SamplingParams(**(DEFAULTS | {"prompt_logprobs": 2}))
    expected = outputs(one_by_one, sampling)
    for answer, whole in zip(outputs(chunked, sampling), expected, strict=True):
        assert told([answer]) == told([whole])
        assert answer.prompt_logprobs is not None
        assert whole.prompt_logprobs is not None
        for found, wanted in zip(
            answer.prompt_logprobs[1:], whole.prompt_logprobs[1:], strict=True
        ):
            assert found is not None
            assert wanted is not None
            assert found.keys() == wanted.keys()
            for token_id, value in wanted.items():
                assert found[token_id].logprob == pytest.approx(value.logprob, abs=1e-4)


def test_held_rows_beside_free_ones(one_by_one: LLM, ahead: LLM) -> None:
    grammar = StructuredOutputsParams(regex="(yes|no){3}")
    held = SamplingParams(**(DEFAULTS | {"structured_outputs": grammar, "ignore_eos": False}))
    free = SamplingParams(**DEFAULTS)
    samplings = [held, free, held, free, free, held]
    expected = told(outputs(one_by_one, samplings))
    assert told(outputs(ahead, samplings)) == expected


def test_a_grammar_that_fails_on_the_way(one_by_one: LLM, ahead: LLM) -> None:
    """Its sequence is given up while the step ahead, with its row, waits for the mask."""
    letters = [ahead.tokenizer.encode(letter)[0] for letter in "ya"]
    grammar = StructuredOutputsParams(regex="[ya]{5}b")
    stuck = {"structured_outputs": grammar, "allowed_token_ids": letters, "logit_bias": {7: 3.0}}
    failing = SamplingParams(**(DEFAULTS | stuck))
    samplings = [failing, SamplingParams(**DEFAULTS)] * 3
    answers = outputs(ahead, samplings)
    assert [len(answer.outputs[0].token_ids) for answer in answers] == [5, 20] * 3
    assert told(answers) == told(outputs(one_by_one, samplings))


def test_an_interrupt_frees_what_still_runs(ahead: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = ahead._loop.scheduler.commit
    num_steps = itertools.count()

    def interrupted(plan: StepPlan, sampled: Any):
        if next(num_steps) == 5:
            raise KeyboardInterrupt
        return commit(plan, sampled)

    with monkeypatch.context() as patch:
        patch.setattr(ahead._loop.scheduler, "commit", interrupted)
        with pytest.raises(KeyboardInterrupt):
            ahead.generate(PROMPTS, SamplingParams(**DEFAULTS), use_tqdm=False)
    assert not ahead._loop.has_work
    assert ahead.engine.num_rows == 0
    assert ahead.engine.pool.counts.referenced == 0
