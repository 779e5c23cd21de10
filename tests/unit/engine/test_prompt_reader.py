"""What is told of a prompt equals what transformers computes, however its chunks fall."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from engine import LLM, BeamSearchParams, PoolingParams, SamplingParams, TokensPrompt
from engine.weights.model_dir import resolve_model
from engine.weights.pooling_config import read_pooling_type
from protocol.errors import InvalidRequestError

PROMPT = [int(i) for i in np.random.default_rng(3).integers(0, 300, 150)]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("model")
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=256,
        initializer_range=0.3,
    )
    LlamaForCausalLM(config).save_pretrained(target)
    built_in = resolve_model(None, progress=False)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (target / name).symlink_to(built_in / name)
    return target


@pytest.fixture(scope="module", params=[16, 64, 2048])
def llm(request: pytest.FixtureRequest, model_dir: Path) -> LLM:
    return LLM(str(model_dir), dtype="float32", num_threads=1, max_num_batched_tokens=request.param)


@pytest.fixture(autouse=True)
def nothing_leaks(llm: LLM):
    yield
    assert llm.engine.num_rows == 0
    assert llm.engine.pool.counts.referenced == 0


@pytest.fixture(scope="module")
def reference(model_dir: Path) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(model_dir, dtype=torch.float32)


def tokens(prompt: list[int]) -> TokensPrompt:
    return {"prompt_token_ids": prompt}


def generate(llm: LLM, prompts: list[list[int]], **options: Any):
    sampling = SamplingParams(**({"max_tokens": 2, "temperature": 0.0} | options))
    return llm.generate([tokens(prompt) for prompt in prompts], sampling, use_tqdm=False)


def test_prompt_logprobs(llm: LLM, reference: LlamaForCausalLM) -> None:
    prompts = [PROMPT, PROMPT[:40], PROMPT[7:9], PROMPT[:1]]
    for prompt, output in zip(prompts, generate(llm, prompts, prompt_logprobs=3), strict=True):
        with torch.inference_mode():
            expected = reference(torch.tensor([prompt])).logits[0].log_softmax(-1)
        found = output.prompt_logprobs
        assert found is not None
        assert found[0] is None
        assert len(found) == len(prompt)
        for i in range(1, len(prompt)):
            entry, row = found[i], expected[i - 1]
            assert entry is not None
            assert entry[prompt[i]].logprob == pytest.approx(float(row[prompt[i]]), abs=1e-4)
            top = row.topk(3)
            assert set(entry) == {*top.indices.tolist(), prompt[i]}
            assert entry[int(top.indices[0])].rank == 1


def test_they_take_nothing_from_the_prefix_cache_but_leave_it_to_others(llm: LLM) -> None:
    llm.engine.pool.reset_cache()
    (first,) = generate(llm, [PROMPT], prompt_logprobs=1)
    (again,) = generate(llm, [PROMPT], prompt_logprobs=1)
    assert (first.num_cached_tokens, again.num_cached_tokens) == (0, 0)
    assert first.prompt_logprobs == again.prompt_logprobs
    (plain,) = generate(llm, [PROMPT])
    assert plain.num_cached_tokens == 144
    assert plain.prompt_logprobs is None
    assert plain.outputs[0].token_ids == first.outputs[0].token_ids


def test_several_outputs_have_one_report(llm: LLM) -> None:
    (output,) = generate(llm, [PROMPT], prompt_logprobs=0, n=3, temperature=1.0, seed=1)
    assert output.prompt_logprobs is not None
    assert len(output.prompt_logprobs) == len(PROMPT)
    assert len(output.outputs) == 3


@pytest.mark.parametrize("kind", ["last", "mean"])
def test_embeddings(llm: LLM, reference: LlamaForCausalLM, kind: Any) -> None:
    prompts = [PROMPT, PROMPT[:33], PROMPT[:1], PROMPT]
    pooling = PoolingParams(type=kind, normalize=False)
    found = llm.embed([tokens(prompt) for prompt in prompts], pooling, use_tqdm=False)
    for prompt, output in zip(prompts, found, strict=True):
        with torch.inference_mode():
            hidden = reference.model(torch.tensor([prompt])).last_hidden_state[0]
        expected = hidden[-1] if kind == "last" else hidden.mean(0)
        assert output.prompt_token_ids == prompt
        np.testing.assert_allclose(output.outputs.embedding, expected.numpy(), atol=1e-4)


def test_embeddings_are_cut_and_have_length_one(llm: LLM) -> None:
    (whole,) = llm.embed(tokens(PROMPT), PoolingParams(normalize=False), use_tqdm=False)
    (cut,) = llm.embed(tokens(PROMPT), PoolingParams(dimensions=8), use_tqdm=False)
    expected = np.array(whole.outputs.embedding[:8])
    np.testing.assert_allclose(
        cut.outputs.embedding, expected / np.linalg.norm(expected), atol=1e-6
    )
    for dimensions in (0, 33):
        with pytest.raises(InvalidRequestError, match="`dimensions` must be between 1 and 32"):
            llm.embed(tokens(PROMPT), PoolingParams(dimensions=dimensions), use_tqdm=False)


def test_a_body_without_a_head(
    llm: LLM, model_dir: Path, reference: LlamaForCausalLM, tmp_path: Path
) -> None:
    """As embedding models are often saved: other names, and sentence-transformers' pooling."""
    reference.model.save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).symlink_to(model_dir / name)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["LlamaModel"]
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling/config.json").write_text('{"pooling_mode_mean_tokens": true}')
    assert read_pooling_type(tmp_path) == "mean"
    body = LLM(str(tmp_path), dtype="float32", num_threads=1)
    (found,) = body.embed(tokens(PROMPT), use_tqdm=False)
    (expected,) = llm.embed(tokens(PROMPT), PoolingParams(type="mean"), use_tqdm=False)
    np.testing.assert_allclose(found.outputs.embedding, expected.outputs.embedding, atol=1e-5)


@pytest.mark.parametrize("width", [1, 4])
def test_beam_search(llm: LLM, reference: LlamaForCausalLM, width: int) -> None:
    prompts = [PROMPT[:40], PROMPT[3:60]]
    params = BeamSearchParams(beam_width=width, max_tokens=6, ignore_eos=True)
    found = llm.beam_search([tokens(prompt) for prompt in prompts], params)
    for prompt, output in zip(prompts, found, strict=True):
        expected = reference.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            num_beams=width,
            num_return_sequences=width,
            max_new_tokens=6,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        assert [beam.tokens for beam in output.sequences] == expected.tolist()
    with pytest.raises(InvalidRequestError, match="`beam_width`"):
        llm.beam_search([tokens(PROMPT)], BeamSearchParams(beam_width=11, max_tokens=1))


def test_a_decoders_first_token_makes_no_vector(llm: LLM) -> None:
    with pytest.raises(InvalidRequestError, match="is for encoders") as refused:
        llm.embed([tokens(PROMPT)], PoolingParams(type="cls"), use_tqdm=False)
    assert refused.value.field == "type"
