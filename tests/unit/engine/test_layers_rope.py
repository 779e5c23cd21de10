"""Cos/sin tables with the parameters of published models, against transformers' own."""

from typing import Any

import pytest
import torch
import transformers
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from engine.layers.rope import rope_table
from engine.models.rope_config import RopeConfig, read_rope_config
from protocol.errors import StartupError

CPU = torch.device("cpu")
LONG_FACTORS = [1.0 + 0.9 * i for i in range(48)]
SHORT_FACTORS = [1.0 + 0.03 * i for i in range(48)]

# (head_dim, max_position_embeddings, rope parameters)
PUBLISHED: dict[str, tuple[int, int, dict[str, Any]]] = {
    "smollm2": (64, 8192, {"rope_theta": 100_000.0, "rope_type": "default"}),
    "vicuna-16k": (128, 4096, {"rope_theta": 10_000.0, "rope_type": "linear", "factor": 4.0}),
    "llama-3.1": (
        128,
        131_072,
        {
            "rope_theta": 500_000.0,
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    ),
    "qwen2.5-yarn": (
        128,
        32_768,
        {
            "rope_theta": 1_000_000.0,
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 32_768,
        },
    ),
    "yarn-untruncated": (
        64,
        131_072,
        {
            "rope_theta": 150_000.0,
            "rope_type": "yarn",
            "factor": 32.0,
            "beta_fast": 24.0,
            "beta_slow": 2.0,
            "truncate": False,
            "original_max_position_embeddings": 4096,
        },
    ),
}
LONGROPE: dict[str, Any] = {
    "rope_theta": 10_000.0,
    "rope_type": "longrope",
    "short_factor": SHORT_FACTORS,
    "long_factor": LONG_FACTORS,
    "original_max_position_embeddings": 4096,
}


def expected_rows(
    head_dim: int, max_len: int, parameters: dict[str, Any], positions: torch.Tensor
) -> torch.Tensor:
    config = transformers.LlamaConfig(
        hidden_size=2 * head_dim,
        num_attention_heads=2,
        head_dim=head_dim,
        max_position_embeddings=max_len,
        rope_parameters=dict(parameters),
    )
    cos, sin = LlamaRotaryEmbedding(config)(torch.zeros(1), positions[None])
    half = head_dim // 2
    return torch.cat((cos[0, :, :half], sin[0, :, :half]), dim=-1)


def read(head_dim: int, max_len: int, parameters: dict[str, Any]) -> RopeConfig:
    raw = {"max_position_embeddings": max_len, "rope_parameters": parameters}
    return read_rope_config(raw, head_dim)


@pytest.mark.parametrize("model", PUBLISHED)
def test_table_of_published_models(model: str) -> None:
    head_dim, max_len, parameters = PUBLISHED[model]
    table = rope_table(read(head_dim, max_len, parameters), 9000, CPU)
    positions = torch.tensor([0, 1, 2, 77, 4096, 8999])
    assert table.shape == (9000, head_dim)
    assert table.dtype is torch.float32
    expected = expected_rows(head_dim, max_len, parameters, positions)
    torch.testing.assert_close(table[positions], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("is_long", [False, True])
def test_longrope_has_a_table_for_short_and_one_for_long_sequences(*, is_long: bool) -> None:
    max_len = 6000
    table = rope_table(read(96, 131_072, LONGROPE), max_len, CPU)
    assert table.shape == (2 * max_len, 96)
    positions = torch.tensor([0, 3, 4000, 5999] if is_long else [0, 3, 4000, 4095])
    expected = expected_rows(96, 131_072, LONGROPE, positions)
    rows = positions + max_len if is_long else positions
    torch.testing.assert_close(table[rows], expected, atol=1e-5, rtol=0)


def test_one_table_where_no_served_sequence_is_long() -> None:
    assert rope_table(read(96, 131_072, LONGROPE), 4096, CPU).shape == (4096, 96)


def test_partial_rotation_has_fewer_columns() -> None:
    raw = {"max_position_embeddings": 64, "partial_rotary_factor": 0.5}
    assert rope_table(read_rope_config(raw, 64), 10, CPU).shape == (10, 32)


def test_unknown_scaling_is_refused() -> None:
    with pytest.raises(StartupError, match="'spiral'"):
        read(64, 128, {"rope_type": "spiral"})


def test_missing_parameter_is_named() -> None:
    with pytest.raises(StartupError, match="'linear' lacks 'factor'"):
        read(64, 128, {"rope_type": "linear"})
