import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from engine.models.config import read_model_config
from protocol.errors import StartupError

RAW: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "eos_token_id": 2,
    "torch_dtype": "bfloat16",
}


def write(target: Path, **overrides: Any) -> Path:
    raw = {key: value for key, value in (RAW | overrides).items() if value is not ...}
    (target / "config.json").write_text(json.dumps(raw))
    return target


def test_sizes_and_defaults(tmp_path: Path) -> None:
    config = read_model_config(write(tmp_path))
    assert (config.head_dim, config.num_kv_heads, config.max_model_len) == (8, 2, 64)
    assert config.dtype == "bfloat16"
    assert config.layer_windows == (None,) * 4
    assert not config.attention_bias
    assert not config.tie_word_embeddings


def test_head_count_without_grouping(tmp_path: Path) -> None:
    assert read_model_config(write(tmp_path, num_key_value_heads=...)).num_kv_heads == 4


def test_eos_ids_of_both_files(tmp_path: Path) -> None:
    write(tmp_path, eos_token_id=7)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [7, 3]}')
    assert read_model_config(tmp_path).eos_token_ids == (3, 7)


@pytest.mark.parametrize(
    ("overrides", "windows"),
    [
        ({"architectures": ["LlamaForCausalLM"], "sliding_window": 8}, (None,) * 4),
        ({"architectures": ["MistralForCausalLM"], "sliding_window": 8}, (8,) * 4),
        ({"architectures": ["MistralForCausalLM"], "sliding_window": None}, (None,) * 4),
        ({"architectures": ["Qwen2ForCausalLM"], "sliding_window": 8}, (None,) * 4),
        (
            {
                "architectures": ["Qwen2ForCausalLM"],
                "sliding_window": 8,
                "use_sliding_window": True,
                "max_window_layers": 1,
            },
            (None, 8, 8, 8),
        ),
        (
            {
                "architectures": ["Qwen3ForCausalLM"],
                "sliding_window": 8,
                "use_sliding_window": True,
                "layer_types": ["sliding_attention", "full_attention"] * 2,
            },
            (8, None, 8, None),
        ),
    ],
)
def test_sliding_windows(
    tmp_path: Path, overrides: dict[str, Any], windows: tuple[int | None, ...]
) -> None:
    assert read_model_config(write(tmp_path, **overrides)).layer_windows == windows


@pytest.mark.parametrize(
    ("scaling", "context_len"),
    [
        ({"rope_type": "linear", "factor": 4.0}, 256),
        ({"type": "dynamic", "factor": 2.0}, 128),
        ({"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}, 128),
    ],
)
def test_scaling_extends_the_context(
    tmp_path: Path, scaling: dict[str, Any], context_len: int
) -> None:
    assert read_model_config(write(tmp_path, rope_scaling=scaling)).max_model_len == context_len


def test_limit_below_and_above_the_context(tmp_path: Path) -> None:
    config = read_model_config(write(tmp_path))
    assert config.limited_to(None) is config
    assert config.limited_to(10).max_model_len == 10
    with pytest.raises(StartupError, match="65 is more than this model's 64"):
        config.limited_to(65)


def test_long_and_short_sequences_differ_only_where_rope_does(tmp_path: Path) -> None:
    config = read_model_config(write(tmp_path))
    assert config.rope_row_offset(64) == 0
    assert config.root_hash(1) == config.root_hash(64)
    scaling = {"rope_type": "dynamic", "factor": 2.0}
    dynamic = read_model_config(write(tmp_path, rope_scaling=scaling)).limited_to(100)
    assert dynamic.rope_row_offset(64) == 0
    assert dynamic.rope_row_offset(65) == 100
    assert dynamic.root_hash(1) == dynamic.root_hash(64)
    assert dynamic.root_hash(64) != dynamic.root_hash(65)
    assert dynamic.root_hash(65, cache_salt="a") != dynamic.root_hash(65)
    limited = dynamic.limited_to(64)
    assert limited.rope_row_offset(100) == 0
    assert limited.root_hash(100) == limited.root_hash(1)


def test_keys_of_one_type_never_match_those_of_another(tmp_path: Path) -> None:
    config = read_model_config(write(tmp_path))
    kinds = ("bfloat16", "float8_e4m3fn", "float8_e5m2")
    assert len({config.root_hash(1, kv_dtype=kind) for kind in kinds}) == len(kinds)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"vocab_size": ...}, "lacks 'vocab_size'"),
        ({"architectures": ...}, "must name one architecture"),
        ({"hidden_act": "gelu"}, "activation 'gelu'"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantized \\(gptq\\)"),
    ],
)
def test_what_cannot_be_served_is_named(
    tmp_path: Path, overrides: dict[str, Any], message: str
) -> None:
    with pytest.raises(StartupError, match=message):
        read_model_config(write(tmp_path, **overrides))


@pytest.mark.parametrize(("text", "message"), [("{", "not valid JSON"), ("[]", "JSON object")])
def test_broken_file(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(StartupError, match=message):
        read_model_config(tmp_path)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(StartupError, match=r"Can't read .*config\.json"):
        read_model_config(tmp_path)


def test_fingerprint_names_content_not_place(tmp_path: Path) -> None:
    dirs = [tmp_path / name for name in ("a", "b", "other-weights", "other-config")]
    for path in dirs:
        path.mkdir()
        write(path, _name_or_path=str(path), transformers_version=path.name)
        (path / "model.safetensors").write_bytes(bytes(100_000))
    (dirs[2] / "model.safetensors").write_bytes(bytes(99_999) + b"x")
    write(dirs[3], rms_norm_eps=1e-6)
    same, again, *others = [read_model_config(path).fingerprint for path in dirs]
    assert same == again
    assert len({same, *others}) == 3


def test_reading_needs_no_torch() -> None:
    code = (
        "import sys, engine.models.config, engine.weights.model_dir;"
        "sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
