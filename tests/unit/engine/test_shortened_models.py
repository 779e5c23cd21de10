"""Which layers stand for all; what is compiled of them is tested on a GPU (tests/gpu)."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.models.causal_lm import CausalLM
from engine.models.config import read_model_config
from engine.models.registry import load_model
from engine.models.shortened import shortened, unlike

QWEN2: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "eos_token_id": 1,
    "torch_dtype": "float32",
}


@pytest.mark.parametrize(
    ("kinds", "layers"),
    [
        ("a", [0]),
        ("aaaa", [2, 3]),
        ("ab", [0, 1]),
        ("ababa", [2, 3, 4]),
        ("ababab", [0, 3, 4, 5]),
        ("aaabb", [1, 2, 3, 4]),
        ("aabac", [0, 1, 2, 3, 4]),
        ("abbbba", [0, 3, 4, 5]),
        ("dabab", [0, 1, 2, 3, 4]),
    ],
)
def test_the_last_and_all_that_follow_each_other(kinds: str, layers: list[int]) -> None:
    assert unlike(kinds) == layers
    few = [kinds[layer] for layer in layers]
    assert {*pairwise(kinds)} <= {*pairwise(few)}
    assert few[0] == kinds[0]


def load(directory: Path, quantization: str | None = None, **overrides: object) -> CausalLM:
    (directory / "config.json").write_text(json.dumps(QWEN2 | overrides))
    return load_model(
        read_model_config(directory).quantized(quantization),
        directory,
        dtype=torch.float32,
        device=torch.device("cpu"),
        load_format="dummy",
        fp8_products=True,
    )


def test_layers_of_one_kind_are_few(tmp_path: Path) -> None:
    model = load(tmp_path)
    few = shortened(model)
    assert few.layers == [model.layers[4], model.layers[5]]
    assert len(model.layers) == 6
    assert shortened(few).layers == few.layers


def test_a_window_makes_a_kind(tmp_path: Path) -> None:
    windows = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 3}
    model = load(tmp_path, **windows)
    assert shortened(model).layers == [model.layers[i] for i in (1, 2, 4, 5)]


def test_a_number_format_makes_a_kind(tmp_path: Path) -> None:
    dense, fp8 = load(tmp_path), load(tmp_path, quantization="fp8")
    dense.layers[2] = fp8.layers[2]
    assert shortened(dense).layers == [dense.layers[i] for i in (1, 2, 4, 5)]
