"""Steps with prompts give the same captured as launched kernel by kernel."""

import gc
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from greedy_reference import GreedyReference
from tiny_models import VOCAB_SIZE, write_tiny_model

from engine import LLM, SamplingParams
from engine.prompt_graphs import PromptGraphs

GREEDY = SamplingParams(temperature=0.0, max_tokens=GreedyReference.max_tokens)


@pytest.fixture(autouse=True)
def _free_memory() -> Iterator[None]:
    """A worker has its process for itself: what others hold in there counts as its own."""
    yield
    gc.collect()
    torch.cuda.empty_cache()


@pytest.fixture
def captured(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """(sequences with one token, prompt tokens) of each step that a graph ran."""
    steps: list[tuple[int, int]] = []
    hidden = PromptGraphs.hidden

    def counted(self: PromptGraphs, arrays: Any, sampled: torch.Tensor) -> torch.Tensor | None:
        result = hidden(self, arrays, sampled)
        if result is not None:
            num_decodes = arrays.num_decodes
            steps.append((num_decodes, len(arrays.token_ids) - num_decodes))
        return result

    monkeypatch.setattr(PromptGraphs, "hidden", counted)
    return steps


def make_prompts(lengths: list[int]) -> list[dict[str, Any]]:
    rng = random.Random(5)
    return [
        {"prompt_token_ids": [rng.randrange(2, VOCAB_SIZE) for _ in range(length)]}
        for length in lengths
    ]


@pytest.mark.parametrize("budget", [48, 200, 1024])
def test_float32_equals_transformers(
    model_dir: Path,
    reference: GreedyReference,
    captured: list[tuple[int, int]],
    budget: int,
) -> None:
    """Prompts come in beside running ones; more of them than a graph takes, too."""
    prompts = make_prompts([1, 2, 17, 300, 64, 65, 5, 5, 128, *[3] * 24, 30, 200])
    llm = LLM(
        str(model_dir),
        dtype="float32",
        gpu_memory_utilization=0.1,
        max_num_batched_tokens=budget,
        enable_prefix_caching=False,
    )
    answers = llm.generate(prompts, GREEDY, use_tqdm=False)
    found = [answer.outputs[0].token_ids for answer in answers]
    assert found == [reference(prompt["prompt_token_ids"]) for prompt in prompts]
    # With the largest, all come at once, and are too many.
    assert bool(captured) == (budget < 1024)
    assert any(num_decodes for num_decodes, _ in captured) == (budget < 1024)
    assert all(num_tokens <= budget for _, num_tokens in captured)


def largest_logprobs(
    model_dir: Path, batches: list[list[dict[str, Any]]], **options: Any
) -> tuple[list[float], list[float]]:
    """Those of each answer's first token, captured and launched kernel by kernel; `batches` of
    prompts come one after the other."""
    sampling = SamplingParams(temperature=0.0, max_tokens=8, logprobs=1, ignore_eos=True)
    found: tuple[list[float], list[float]] = ([], [])
    for enforce_eager, largest in zip((False, True), found, strict=True):
        llm = LLM(
            str(model_dir),
            dtype="bfloat16",
            gpu_memory_utilization=0.1,
            enforce_eager=enforce_eager,
            **options,
        )
        for prompts in batches:
            for answer in llm.generate(prompts, sampling, use_tqdm=False):
                (output,) = answer.outputs
                assert output.logprobs is not None
                largest.append(max(value.logprob for value in output.logprobs[0].values()))
        del llm
        gc.collect()
    return found


@pytest.mark.parametrize("kv_cache_dtype", ["auto", "fp8"])
def test_16_bits_are_near_what_kernel_by_kernel_gives(
    tmp_path: Path, captured: list[tuple[int, int]], kv_cache_dtype: str
) -> None:
    model_dir = write_tiny_model("llama", tmp_path)
    graphs, launched = largest_logprobs(
        model_dir,
        [make_prompts([700, 33, 90, 256, 1, 420, 16, 31])],
        kv_cache_dtype=kv_cache_dtype,
        max_num_batched_tokens=256,
        enable_prefix_caching=False,
    )
    assert captured
    assert graphs == pytest.approx(launched, abs=0.1)


@pytest.mark.parametrize("kv_cache_dtype", ["auto", "fp8"])
def test_few_tokens_behind_a_long_context(
    tmp_path: Path, captured: list[tuple[int, int]], kv_cache_dtype: str
) -> None:
    """A chat's next turn is captured, and so is the end of a long prompt, but not its middle."""
    model_dir = write_tiny_model("llama", tmp_path)
    config = json.loads((model_dir / "config.json").read_text())
    config["max_position_embeddings"] = 9000
    (model_dir / "config.json").write_text(json.dumps(config))
    (long,) = make_prompts([8200])
    turn = {"prompt_token_ids": long["prompt_token_ids"] + [7] * 40}
    graphs, launched = largest_logprobs(
        model_dir, [[long], [turn]], kv_cache_dtype=kv_cache_dtype, max_num_batched_tokens=2048
    )
    # The cached blocks of 16 hold 8,192 tokens of the prompt.
    assert captured == [(0, 2048), (0, 2048), (0, 8), (0, 48)]
    assert graphs == pytest.approx(launched, abs=0.1)


def test_a_prompt_that_is_read_is_launched(
    model_dir: Path, captured: list[tuple[int, int]], prompts: list[list[int]]
) -> None:
    llm = LLM(str(model_dir), dtype="float32", gpu_memory_utilization=0.1)
    sampling = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=1)
    llm.generate({"prompt_token_ids": prompts[4]}, sampling, use_tqdm=False)
    assert not captured
