"""Vectors of small random encoders against transformers', however texts are batched."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_encoders import reference_states, write_encoder, write_pooling
from tokenizers import Tokenizer as Backend
from transformers import PreTrainedModel

from engine import LLM, PoolingParams, SamplingParams, TokensPrompt
from engine.config import EngineConfig
from engine.encoder import EncoderEngine
from engine.engine import Engine
from protocol.errors import ContextLengthError, InvalidRequestError, StartupError
from protocol.pooling import PoolingType

TOLERANCE = 2e-5

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("BertModel", {}),
    "bert-one-type": ("BertModel", {"type_vocab_size": 1}),
    "bert-tanh": ("BertModel", {"hidden_act": "gelu_new"}),
    "bert-relu": ("BertModel", {"hidden_act": "relu", "layer_norm_eps": 1e-5}),
    "bert-with-head": ("BertForMaskedLM", {}),
    "roberta": ("RobertaModel", {"pad_token_id": 1}),
    "roberta-with-head": ("RobertaForMaskedLM", {"pad_token_id": 3}),
    "xlm-roberta": ("XLMRobertaModel", {"pad_token_id": 1, "type_vocab_size": 1}),
}


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    path = tmp_path_factory.mktemp(request.param)
    kind, options = CASES[request.param]
    return path, write_encoder(path, kind, **options)


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, PreTrainedModel]:
    path = tmp_path_factory.mktemp("bert")
    return path, write_encoder(path, "BertModel")


def load(path: Path, **options: Any) -> LLM:
    return LLM(str(path), dtype="float32", num_threads=1, **options)


def texts(*lengths: int, first_id: int = 4) -> list[list[int]]:
    """Token ids without padding's, which RoBERTa's reference counts no position for."""
    rng = np.random.default_rng(len(lengths))
    return [[int(i) for i in rng.integers(first_id, 97, length)] for length in lengths]


def embed(llm: LLM, prompts: list[list[int]], **params: Any) -> np.ndarray:
    tokens: list[TokensPrompt] = [{"prompt_token_ids": prompt} for prompt in prompts]
    outputs = llm.embed(tokens, PoolingParams(**params), use_tqdm=False)
    assert [output.prompt_token_ids for output in outputs] == prompts
    return np.array([output.outputs.embedding for output in outputs])


def pooled(model: PreTrainedModel, prompt: list[int], kind: PoolingType) -> np.ndarray:
    states = reference_states(model, prompt)
    by_kind = {"mean": states.mean(0), "cls": states[0], "last": states[-1]}
    return by_kind[kind].numpy()


@pytest.mark.parametrize("kind", ["mean", "cls", "last"])
def test_vectors_equal_the_references(case: tuple[Path, PreTrainedModel], kind: PoolingType):
    path, model = case
    prompts = texts(1, 60, 2, 17, 17, 31, 59, 16, 5)
    found = embed(load(path), prompts, type=kind, normalize=False)
    expected = np.stack([pooled(model, prompt, kind) for prompt in prompts])
    np.testing.assert_allclose(found, expected, atol=TOLERANCE)


@pytest.mark.parametrize(
    "limits", [{"max_num_seqs": 1}, {"max_num_seqs": 3}, {"max_num_batched_tokens": 50}, {}]
)
def test_a_batch_changes_nothing(bert: tuple[Path, PreTrainedModel], limits: dict[str, int]):
    path, model = bert
    prompts = texts(*range(1, 64))
    found = embed(load(path, **limits), prompts, type="mean", normalize=False)
    expected = np.stack([pooled(model, prompt, "mean") for prompt in prompts])
    np.testing.assert_allclose(found, expected, atol=TOLERANCE)


def test_all_positions_are_served(case: tuple[Path, PreTrainedModel]):
    path, model = case
    first = model.config.pad_token_id + 1 if "roberta" in model.config.model_type else 0
    (longest,) = texts(64 - first)
    llm = load(path)
    found = embed(llm, [longest], type="mean", normalize=False)
    np.testing.assert_allclose(found[0], pooled(model, longest, "mean"), atol=TOLERANCE)
    with pytest.raises(ContextLengthError, match=f"up to {64 - first} tokens; one has"):
        embed(llm, [[5], [*longest, 5]], type="mean")


def test_dimensions_and_length(bert: tuple[Path, PreTrainedModel]):
    path, model = bert
    (prompt,) = texts(9)
    llm = load(path)
    whole = pooled(model, prompt, "mean")
    (found,) = embed(llm, [prompt], type="mean", dimensions=5)
    np.testing.assert_allclose(found, whole[:5] / np.linalg.norm(whole[:5]), atol=TOLERANCE)
    with pytest.raises(InvalidRequestError, match="between 1 and 32, got 33"):
        embed(llm, [prompt], type="mean", dimensions=33)


def test_a_text_is_pooled_as_its_makers_say(tmp_path: Path):
    model = write_encoder(tmp_path, "BertModel")
    write_pooling(tmp_path, pooling_mode_cls_token=True, pooling_mode_mean_tokens=False)
    (output,) = load(tmp_path).embed("The cat sat.", use_tqdm=False)
    assert output.prompt_token_ids == [2, 4, 5, 6, 12, 3]
    expected = pooled(model, output.prompt_token_ids, "cls")
    expected /= np.linalg.norm(expected)
    np.testing.assert_allclose(output.outputs.embedding, expected, atol=TOLERANCE)


def test_bfloat16_is_near(bert: tuple[Path, PreTrainedModel]):
    path, _ = bert
    prompts = texts(3, 40, 11)
    exact = embed(load(path), prompts, type="mean")
    near = embed(LLM(str(path), dtype="bfloat16", num_threads=1), prompts, type="mean")
    assert ((exact * near).sum(1) > 0.999).all()


def test_it_generates_nothing(bert: tuple[Path, PreTrainedModel]):
    llm = load(bert[0], load_format="dummy")
    with pytest.raises(InvalidRequestError, match="only embeds"):
        llm.generate("The cat", SamplingParams(max_tokens=1), use_tqdm=False)
    with pytest.raises(InvalidRequestError, match="only embeds"):
        _ = llm.engine


@pytest.mark.parametrize(
    ("prompt", "message"), [([], "at least one token"), ([97], "between 0 and 96")]
)
def test_bad_tokens(bert: tuple[Path, PreTrainedModel], prompt: list[int], message: str):
    with pytest.raises(InvalidRequestError, match=message):
        embed(load(bert[0], load_format="dummy"), [prompt], type="mean")


def test_each_engine_names_the_other(bert: tuple[Path, PreTrainedModel]):
    path, _ = bert
    with pytest.raises(StartupError, match="tandem encode"):
        Engine.load(EngineConfig(model=str(path), device="cpu"), progress=False)
    for asked in ({"quantization": "fp8"}, {"quantization_ignore": ("re:.*",)}):
        with pytest.raises(StartupError, match="isn't for encoders"):
            EncoderEngine.load(EngineConfig(model=str(path), **asked), progress=False)
    with pytest.raises(StartupError, match="more than this model's 64 positions"):
        EncoderEngine.load(EngineConfig(model=str(path), max_model_len=65), progress=False)


def test_weights_without_use_are_no_cause_for_alarm(
    bert: tuple[Path, PreTrainedModel], caplog: pytest.LogCaptureFixture
):
    """BERT's pooler, which was trained for another task."""
    load(bert[0])
    assert not caplog.records
    assert torch.is_inference_mode_enabled() is False


def test_a_mark_that_the_model_has_no_embedding_for_is_refused(tmp_path: Path) -> None:
    write_encoder(tmp_path, "BertModel", vocab_size=14)
    llm = load(tmp_path)
    assert llm.tokenizer.num_ids == 14
    backend = Backend.from_file(str(tmp_path / "tokenizer.json"))
    backend.add_special_tokens(["<late>"])
    backend.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(InvalidRequestError, match="between 0 and 13"):
        load(tmp_path).embed("the <late> cat")
