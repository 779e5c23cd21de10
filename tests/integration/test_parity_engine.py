"""Greedy output of the built-in model equals transformers', however steps and blocks fall.

In float32: in bfloat16 near ties of first tokens abound, and then rounding decides.
"""

from pathlib import Path

import pytest
from greedy_reference import LENGTHS, MAX_TOKENS, GreedyReference

from engine import LLM, RequestOutput, SamplingParams, TokensPrompt

GREEDY = SamplingParams(temperature=0.0, max_tokens=MAX_TOKENS)


@pytest.fixture(scope="module")
def llm(model_dir: Path) -> LLM:
    return LLM(str(model_dir), dtype="float32")


def tokens_prompts(prompts: list[list[int]]) -> list[TokensPrompt]:
    return [{"prompt_token_ids": prompt} for prompt in prompts]


def run(llm: LLM, prompts: list[list[int]], sampling: SamplingParams) -> list[RequestOutput]:
    outputs = llm.generate(tokens_prompts(prompts), sampling, use_tqdm=False)
    assert llm.engine.num_rows == 0
    assert llm.engine.pool.counts.referenced == 0
    llm.engine.pool.check_integrity()
    return outputs


def token_ids(outputs: list[RequestOutput]) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in outputs]


@pytest.mark.parametrize("place", range(len(LENGTHS)), ids=lambda place: f"{LENGTHS[place]}")
def test_alone(llm: LLM, prompts: list[list[int]], reference: GreedyReference, place: int) -> None:
    llm.engine.pool.reset_cache()
    outputs = run(llm, [prompts[place]], GREEDY)
    assert outputs[0].num_cached_tokens == 0
    [found] = token_ids(outputs)
    assert found == reference(prompts[place], found)


def test_the_reference_believes_no_wrong_guess(
    prompts: list[list[int]], reference: GreedyReference
) -> None:
    prompt = prompts[2][::-1]
    answer = reference(prompt, [7] * MAX_TOKENS)
    assert answer == reference._generate(prompt)
    assert reference._is_greedy(prompt, answer)
    for place in (0, 5, MAX_TOKENS - 1):
        assert not reference._is_greedy(prompt, [*answer[:place], 7, *answer[place + 1 :]])
    assert not reference._is_greedy(prompt, answer[:-1])


def test_32_at_once(llm: LLM, prompts: list[list[int]], reference: GreedyReference) -> None:
    """Each of 16 prompts and the same without its first token: 32 that share nothing."""
    llm.engine.pool.reset_cache()
    short = [prompt[:200] for prompt in prompts]
    batch = [*short, *(prompt[1:] for prompt in short)]
    found = token_ids(run(llm, batch, GREEDY))
    assert found == reference.answers(batch, found)


def test_shared_prefix_asked_twice(
    llm: LLM, prompts: list[list[int]], reference: GreedyReference
) -> None:
    llm.engine.pool.reset_cache()
    prefix, *endings = prompts[-2], prompts[3], prompts[5], prompts[8]
    batch = [prefix + ending for ending in endings]
    found = [output for prompt in batch for output in token_ids(run(llm, [prompt], GREEDY))]
    expected = reference.answers(batch, found)
    assert found == expected
    again = run(llm, batch, GREEDY)
    assert token_ids(again) == expected
    for output in again:
        assert output.num_cached_tokens >= len(prefix) // 16 * 16


def test_chunked_prefill_and_preemption(
    model_dir: Path, prompts: list[list[int]], reference: GreedyReference
) -> None:
    """Prompts in chunks of at most 48 tokens, beside running sequences, in a pool that holds
    their prompts but not their outputs."""
    batch = [prompt for prompt in prompts if len(prompt) < 200]
    sampled = SamplingParams(temperature=0.9, top_p=0.95, seed=3, max_tokens=40, ignore_eos=True)
    roomy = LLM(str(model_dir), dtype="float32", num_gpu_blocks_override=200)
    seeded = token_ids(run(roomy, batch, sampled))
    tight = LLM(
        str(model_dir),
        dtype="float32",
        num_gpu_blocks_override=sum(-(-len(prompt) // 16) for prompt in batch) + 3,
        max_num_batched_tokens=48,
        max_num_seqs=32,
        enable_prefix_caching=False,
    )
    found = token_ids(run(tight, batch, GREEDY))
    assert found == reference.answers(batch, found)
    assert token_ids(run(tight, batch, sampled)) == seeded
    assert tight._loop.scheduler.stats.num_preemptions > 0
