"""What is read of an encoder's directory, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_encoders import write_pooling

from engine.models.encoder_config import is_encoder, read_encoder_config
from engine.weights.pooling_config import read_encoder_pooling_type
from protocol.errors import StartupError

BERT: dict[str, Any] = {
    "architectures": ["BertModel"],
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}


def write(path: Path, **changes: Any) -> Path:
    (path / "config.json").write_text(json.dumps(BERT | changes))
    return path


def test_defaults_are_transformers(tmp_path: Path) -> None:
    config = read_encoder_config(write(tmp_path))
    assert (config.layer_norm_eps, config.activation, config.num_token_types) == (1e-12, "gelu", 2)
    assert (config.max_model_len, config.num_positions, config.head_dim) == (64, 64, 8)


def test_roberta_counts_positions_from_behind_the_padding(tmp_path: Path) -> None:
    config = read_encoder_config(write(tmp_path, architectures=["XLMRobertaModel"], pad_token_id=1))
    assert (config.first_position, config.max_model_len) == (2, 62)


def test_makers_may_say_less_than_the_positions_and_operators_more(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "sentence_bert_config.json").write_text('{"max_seq_length": 40}')
    config = read_encoder_config(tmp_path)
    assert config.max_model_len == 40
    assert config.limited_to(64).max_model_len == 64
    assert config.limited_to(None) is config
    with pytest.raises(StartupError, match="64 positions"):
        config.limited_to(65)


@pytest.mark.parametrize("architectures", [["LlamaForCausalLM"], [], ["BertModel", "BertModel"]])
def test_others_are_no_encoders(tmp_path: Path, architectures: list[str]) -> None:
    assert not is_encoder(write(tmp_path, architectures=architectures))
    with pytest.raises(StartupError, match="which is no encoder"):
        read_encoder_config(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_act": "silu"}, "activation 'silu'"),
        ({"position_embedding_type": "relative_key"}, "'relative_key' position embeddings"),
        ({"is_decoder": True}, "is_decoder"),
        ({"quantization_config": {"quant_method": "fp8"}}, "served unquantized"),
    ],
)
def test_what_would_be_computed_wrongly_is_refused(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(StartupError, match=message):
        read_encoder_config(write(tmp_path, **changes))


def test_a_missing_size_is_named(tmp_path: Path) -> None:
    write(tmp_path)
    raw = {key: value for key, value in BERT.items() if key != "num_hidden_layers"}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(StartupError, match="lacks 'num_hidden_layers'"):
        read_encoder_config(tmp_path)


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("pooling_mode_mean_tokens", "mean"),
        ("pooling_mode_cls_token", "cls"),
        ("pooling_mode_lasttoken", "last"),
    ],
)
def test_pooling(tmp_path: Path, mode: str, expected: str) -> None:
    assert read_encoder_pooling_type(tmp_path) == "mean"
    write_pooling(tmp_path, **{mode: True, "pooling_mode_max_tokens": False})
    assert read_encoder_pooling_type(tmp_path) == expected


@pytest.mark.parametrize(
    "modes",
    [
        {},
        {"pooling_mode_max_tokens": True},
        {"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": True},
    ],
)
def test_other_poolings_are_refused(tmp_path: Path, modes: dict[str, bool]) -> None:
    write_pooling(tmp_path, **modes)
    with pytest.raises(StartupError, match="served is one of"):
        read_encoder_pooling_type(tmp_path)


@pytest.mark.parametrize(
    ("modules", "message"),
    [
        ('[{"type": "sentence_transformers.models.Dense"}]', "a module 'Dense'"),
        ("{", "not valid JSON"),
        ('{"type": "Pooling"}', "a list of JSON objects"),
    ],
)
def test_other_modules_are_refused(tmp_path: Path, modules: str, message: str) -> None:
    (tmp_path / "modules.json").write_text(modules)
    with pytest.raises(StartupError, match=message):
        read_encoder_pooling_type(tmp_path)
