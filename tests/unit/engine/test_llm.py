"""`LLM` over a tiny random model with the built-in model's tokenizer."""

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny_llama import write_tiny_llama

import engine
from engine import LLM, SamplingParams, StructuredOutputsParams
from engine.scheduler.plan import StepPlan
from protocol.errors import ContextLengthError, InvalidRequestError, StartupError
from protocol.sampling import ThoughtLimit

PROMPT = "Once upon a time there was a fox"


def sampling_with(**options: Any) -> SamplingParams:
    """Seeded: this model's greedy output is one word again and again."""
    defaults = {"seed": 5, "max_tokens": 20, "ignore_eos": True}
    return SamplingParams(**(defaults | options))


SEEDED = sampling_with()


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def llm(model_dir: Path) -> LLM:
    return LLM(str(model_dir), load_format="dummy", dtype="float32", num_threads=1)


@pytest.fixture(autouse=True)
def nothing_leaks(llm: LLM):
    yield
    assert llm.engine.num_rows == 0
    assert llm.engine.pool.counts.referenced == 0
    llm.engine.pool.check_integrity()


def generate(llm: LLM, sampling: SamplingParams, prompt: str = PROMPT):
    (output,) = llm.generate(prompt, sampling, use_tqdm=False)
    return output.outputs[0]


def test_outputs_are_in_the_prompts_order(llm: LLM) -> None:
    prompts = [f"{PROMPT} {i}" for i in range(20)]
    lengths = [SamplingParams(temperature=0.0, max_tokens=1 + i % 7) for i in range(20)]
    together = llm.generate(prompts, lengths, use_tqdm=False)
    assert [output.prompt for output in together] == prompts
    for prompt, sampling, output in zip(prompts, lengths, together, strict=True):
        assert output.prompt_token_ids == llm.tokenizer.encode(prompt)
        assert output.outputs[0] == generate(llm, sampling, prompt)


def test_text_is_the_tokens_text(llm: LLM) -> None:
    output = generate(llm, SEEDED)
    assert len(output.token_ids) == 20
    assert output.text == llm.tokenizer.decode(output.token_ids)
    assert (output.finish_reason, output.stop_reason) == ("length", None)
    tokens = llm.generate(
        {"prompt_token_ids": llm.tokenizer.encode(PROMPT)}, SEEDED, use_tqdm=False
    )
    assert tokens[0].prompt is None
    assert tokens[0].outputs == [output]


@pytest.mark.parametrize("include", [False, True])
def test_a_stop_string_may_span_tokens(llm: LLM, *, include: bool) -> None:
    full = generate(llm, SEEDED)
    first = len(llm.tokenizer.decode(full.token_ids[:5]))
    stop = full.text[first - 2 : first + 2]
    assert full.text.count(stop) == 1
    sampling = sampling_with(
        stop=("never that", stop),
        include_stop_str_in_output=include,
    )
    output = generate(llm, sampling)
    cut = full.text.index(stop) + (len(stop) if include else 0)
    assert output.text == full.text[:cut]
    assert (output.finish_reason, output.stop_reason) == ("stop", stop)
    assert output.token_ids == full.token_ids[: len(output.token_ids)]
    assert 5 < len(output.token_ids) < 20


def test_a_stop_string_that_only_began_is_text(llm: LLM) -> None:
    full = generate(llm, SEEDED)
    sampling = sampling_with(stop=(full.text[-3:] + "\0",))
    assert generate(llm, sampling) == full


def test_stop_token_ids_end_the_output_without_their_text(llm: LLM) -> None:
    full = generate(llm, SEEDED)
    stop_id = full.token_ids[6]
    place = full.token_ids.index(stop_id)
    sampling = sampling_with(stop_token_ids=(stop_id,))
    output = generate(llm, sampling)
    assert output.token_ids == full.token_ids[: place + 1]
    assert output.text == llm.tokenizer.decode(full.token_ids[:place])
    assert (output.finish_reason, output.stop_reason) == ("stop", stop_id)


def test_min_tokens_holds_off_stop_strings_and_eos(llm: LLM) -> None:
    full = generate(llm, SEEDED)
    (eos,) = llm.engine.model.eos_token_ids
    sampling = sampling_with(
        min_tokens=8, stop=(full.text[:3],), logit_bias={eos: 100.0}, ignore_eos=False
    )
    output = generate(llm, sampling)
    assert len(output.token_ids) == 9
    assert output.token_ids[-1] == eos
    assert (output.finish_reason, output.stop_reason) == ("stop", None)
    assert output.text == llm.tokenizer.decode(output.token_ids[:-1])


def test_n_outputs_are_independent_and_reproducible(llm: LLM) -> None:
    sampling = SamplingParams(n=3, temperature=1.0, seed=11, max_tokens=10, ignore_eos=True)
    first = llm.generate(PROMPT, sampling, use_tqdm=False)[0].outputs
    assert [output.index for output in first] == [0, 1, 2]
    assert len({tuple(output.token_ids) for output in first}) == 3
    assert llm.generate(PROMPT, sampling, use_tqdm=False)[0].outputs == first


def test_logprobs_name_the_likeliest_tokens_and_the_sampled_one(llm: LLM) -> None:
    sampling = SamplingParams(temperature=5.0, seed=1, max_tokens=6, logprobs=2, ignore_eos=True)
    output = generate(llm, sampling)
    assert output.logprobs is not None
    assert len(output.logprobs) == 6
    for token_id, named in zip(output.token_ids, output.logprobs, strict=True):
        assert token_id in named
        assert {1, 2} <= {entry.rank for entry in named.values()}
        assert named[token_id].decoded_token == llm.tokenizer.decode([token_id])
    total = sum(
        named[i].logprob for i, named in zip(output.token_ids, output.logprobs, strict=True)
    )
    assert output.cumulative_logprob == pytest.approx(total)
    assert math.isfinite(total)


def test_without_max_tokens_output_fills_the_context(llm: LLM) -> None:
    sampling = SamplingParams(temperature=0.0, max_tokens=None, ignore_eos=True)
    output = generate(llm, sampling)
    assert len(output.token_ids) + len(llm.tokenizer.encode(PROMPT)) == 128
    assert output.finish_reason == "length"


def test_a_prefix_is_computed_once(llm: LLM) -> None:
    llm.engine.pool.reset_cache()
    prompt: engine.TokensPrompt = {"prompt_token_ids": list(range(100, 150))}
    assert llm.generate(prompt, SEEDED, use_tqdm=False)[0].num_cached_tokens == 0
    assert llm.generate(prompt, SEEDED, use_tqdm=False)[0].num_cached_tokens == 48


def test_chat_renders_the_models_template(llm: LLM) -> None:
    messages = [{"role": "user", "content": "Hello"}]
    one = llm.chat(messages, SEEDED, use_tqdm=False)
    several = llm.chat([messages, messages], SEEDED, use_tqdm=False)
    prompt_token_ids = llm.tokenizer.apply_chat_template(messages)
    assert [output.prompt_token_ids for output in (*one, *several)] == [prompt_token_ids] * 3
    assert several[0].outputs == several[1].outputs == one[0].outputs


def test_bad_requests_are_refused_before_anything_runs(llm: LLM) -> None:
    good = {"prompt_token_ids": [1, 2]}
    with pytest.raises(ContextLengthError, match="200 tokens"):
        llm.generate([good, {"prompt_token_ids": [1] * 200}], SEEDED, use_tqdm=False)
    with pytest.raises(InvalidRequestError, match="Token ids"):
        llm.generate({"prompt_token_ids": [49_152]}, SEEDED, use_tqdm=False)
    with pytest.raises(InvalidRequestError, match="temperature"):
        llm.generate(PROMPT, SamplingParams(temperature=-1.0), use_tqdm=False)
    with pytest.raises(InvalidRequestError, match="2 prompts, but 1"):
        llm.generate([good, good], [SEEDED], use_tqdm=False)
    with pytest.raises(InvalidRequestError, match="empty"):
        llm.generate({"prompt_token_ids": []}, SEEDED, use_tqdm=False)


def test_an_interrupt_leaves_the_engine_free(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    launch = llm.engine.launch

    def interrupted(plan: StepPlan):
        if plan.scheduled[0].sequence.num_output_tokens == 3:
            raise KeyboardInterrupt
        return launch(plan)

    with monkeypatch.context() as patch:
        patch.setattr(llm.engine, "launch", interrupted)
        with pytest.raises(KeyboardInterrupt):
            llm.generate([PROMPT, PROMPT[4:]], SEEDED, use_tqdm=False)
    assert not llm._loop.has_work
    assert len(generate(llm, SEEDED).token_ids) == 20


def test_a_model_that_cannot_run_is_refused(model_dir: Path) -> None:
    with pytest.raises(StartupError, match="128"):
        LLM(str(model_dir), load_format="dummy", max_model_len=129)
    with pytest.raises(StartupError, match="max-model-len"):
        LLM(str(model_dir), load_format="dummy", max_model_len=128, kv_cache_memory_bytes=10_000)


def test_the_package_imports_torch_only_when_asked_for() -> None:
    script = (
        "import sys, engine, engine.scheduler.decode, engine.tokenizer, engine.model_info;"
        "assert 'torch' not in sys.modules;"
        "engine.SamplingParams; assert 'torch' not in sys.modules;"
        "engine.LLM; assert 'torch' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
    with pytest.raises(AttributeError, match="nothing_like_it"):
        engine.nothing_like_it  # noqa: B018


def test_preempted_sequences_are_reported_once(llm: LLM, model_dir: Path) -> None:
    prompts = [llm.tokenizer.encode(f"{i} {PROMPT * 9}")[:50] for i in range(6)]
    sampling = sampling_with(prompt_logprobs=1, max_tokens=60)
    tight = LLM(
        str(model_dir),
        load_format="dummy",
        dtype="float32",
        num_threads=1,
        num_gpu_blocks_override=20,
    )
    asked = [{"prompt_token_ids": prompt} for prompt in prompts]
    expected = llm.generate(asked, sampling, use_tqdm=False)
    preempted = 0
    schedule = tight._loop.scheduler.schedule

    def counting():
        nonlocal preempted
        plan = schedule()
        preempted += len(plan.preempted)
        return plan

    tight._loop.scheduler.schedule = counting
    found = tight.generate(asked, sampling, use_tqdm=False)
    assert preempted
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.outputs[0].token_ids == theirs.outputs[0].token_ids
        assert ours.prompt_logprobs is not None
        assert len(ours.prompt_logprobs) == 50
        for entry, wanted in zip(ours.prompt_logprobs[1:], theirs.prompt_logprobs[1:], strict=True):
            assert {i: e.logprob for i, e in entry.items()} == pytest.approx(
                {i: e.logprob for i, e in wanted.items()}, abs=1e-4
            )


def test_an_output_whose_grammar_fails_is_given_up_alone(llm: LLM) -> None:
    """Behind its first token this grammar has too many ways to go on."""
    choice = tuple(f"x{number}" for number in range(20_000))
    broken = sampling_with(structured_outputs=StructuredOutputsParams(choice=choice))
    held = sampling_with(structured_outputs=StructuredOutputsParams(regex="[a-z]{9}"))
    alone = [output.outputs[0] for output in llm.generate([PROMPT] * 2, [SEEDED, held])]
    free, failed, also_held = llm.generate([PROMPT] * 3, [SEEDED, broken, held])
    assert [free.outputs[0], also_held.outputs[0]] == alone
    assert failed.outputs[0].text == "x"
    assert failed.outputs[0].finish_reason == "abort"
    assert "can't be followed any further" in str(failed.outputs[0].stop_reason)
    assert llm.engine.num_rows == 0
    assert llm.engine.pool.counts.referenced == 0


def test_thoughts_end_in_time(llm: LLM) -> None:
    """One by one as in a batch, the first token, which comes of the prompt's step, included."""
    for max_tokens in (0, 1, 5):
        limit = ThoughtLimit(
            max_tokens=max_tokens, opening_token_id=3, closing_token_id=4, starts_inside=True
        )
        free, held = llm.generate([PROMPT] * 2, [SEEDED, sampling_with(thoughts=limit)])
        thoughts = free.outputs[0].token_ids[:max_tokens]
        assert 4 not in thoughts
        assert held.outputs[0].token_ids[: max_tokens + 1] == [*thoughts, 4]
        assert len(held.outputs[0].token_ids) == 20
