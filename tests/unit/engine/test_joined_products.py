"""A decoder whose layers' products run as one kernel each, with torch in the kernel's place."""

import functools
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from engine.layers import decoder as layers
from engine.layers.attention import AttentionOptions
from engine.models import decoder as models
from engine.models.config import read_model_config
from engine.models.decoder import DecoderModel
from engine.models.shortened import shortened
from engine.weights.source import DummyWeights, LinearFormat
from kernels import layer as kernel
from kernels.attention import AttentionBatch, LastTokens
from kernels.fp8 import quantize_rows_reference

NUM_LAYERS, NUM_SEQS, BLOCK_SIZE = 3, 5, 4
SHAPE = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 96,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e4,
    "eos_token_id": 2,
}


def make_model(
    model_dir: Path, *, qkv_bias: bool = False, ignored: tuple[str, ...] = ()
) -> DecoderModel:
    (model_dir / "config.json").write_text(json.dumps(SHAPE))
    config = read_model_config(model_dir).quantized("fp8", ignored)
    linear_format = LinearFormat(config.quantization, multiplies_fp8=True)
    weights = DummyWeights(torch.float32, torch.device("cpu"), linear_format=linear_format)
    torch.manual_seed(0)
    return DecoderModel(config, weights, [AttentionOptions(qkv_bias=qkv_bias)] * NUM_LAYERS)


def decode_step() -> AttentionBatch:
    """The first token of each sequence."""
    return AttentionBatch(
        query_starts=torch.arange(NUM_SEQS + 1, dtype=torch.int32),
        kv_lens=torch.ones(NUM_SEQS, dtype=torch.int32),
        block_tables=torch.arange(NUM_SEQS, dtype=torch.int32)[:, None],
        slots=torch.arange(NUM_SEQS) * BLOCK_SIZE,
        positions=torch.zeros(NUM_SEQS, dtype=torch.int64),
        max_query_len=1,
        max_kv_len=1,
        num_seqs=NUM_SEQS,
    )


def forward(model: DecoderModel, last: LastTokens | None = None) -> Tensor:
    head_dim = SHAPE["hidden_size"] // SHAPE["num_attention_heads"]
    pool = torch.zeros(NUM_SEQS, NUM_LAYERS, 2, SHAPE["num_key_value_heads"], BLOCK_SIZE, head_dim)
    return model.forward(torch.arange(NUM_SEQS) + 7, decode_step(), pool, last)


@pytest.fixture
def joined(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Of each call of the kernel, whether something followed."""
    calls: list[bool] = []

    def run(
        attended: Tensor,
        stream: Tensor,
        weights: kernel.LayerWeights,
        following: kernel.NextWeights | None,
        eps: float,
    ) -> Tensor | None:
        calls.append(following is not None)
        return kernel.joined_products_reference(attended, stream, weights, following, eps)

    monkeypatch.setattr(layers, "joins_products", lambda *_: True)
    monkeypatch.setattr(layers, "joined_products", run)
    return calls


@pytest.mark.parametrize(
    ("ignored", "calls"),
    [
        ((), [True, True, False]),
        (("model.layers.0.mlp",), [True, False]),
        (("model.layers.2.mlp.down_proj",), [True, False]),
        (("model.layers.2.self_attn",), [True, False]),
        (("model.layers.1.self_attn.k_proj",), [False, False]),
        (("re:.*mlp",), []),
    ],
)
def test_the_same_hidden_states(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    joined: list[bool],
    ignored: tuple[str, ...],
    calls: list[bool],
) -> None:
    """Also where some layers, which aren't of 8 bits, stay apart."""
    # The kernel has the scale of a token's largest number, and doesn't try another.
    by_largest = functools.partial(quantize_rows_reference, num_tried=1)
    for module in ("kernels.norm", "kernels.activation", "kernels.fp8"):
        monkeypatch.setattr(f"{module}.quantize_rows_reference", by_largest)
    model = make_model(tmp_path, ignored=ignored)
    actual = forward(model)
    assert joined == calls
    monkeypatch.setattr(layers, "joins_products", lambda *_: False)
    expected = forward(model)
    assert len(joined) == len(calls)
    # Activations have scales of their blocks instead of the whole row.
    torch.testing.assert_close(actual, expected, atol=0.05, rtol=0.05)
    assert torch.equal(actual, expected) == (not calls)


def test_steps_with_prompts_stay_apart(tmp_path: Path, joined: list[bool]) -> None:
    last = LastTokens(rows=torch.arange(NUM_SEQS), batch=decode_step())
    forward(make_model(tmp_path), last)
    assert not joined


def test_attention_is_prepared_before_the_first_layer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For all layers' windows, and for the last one's where it has last tokens alone."""
    prepared: list[tuple[int, list[int | None]]] = []

    def prepare(batch: AttentionBatch, _: Tensor, windows: Sequence[int | None]) -> None:
        prepared.append((id(batch), list(windows)))

    monkeypatch.setattr(models, "prepare", prepare)
    model = make_model(tmp_path)
    model.config = replace(model.config, layer_windows=(None, 8, 4))
    forward(model)
    assert [windows for _, windows in prepared] == [[None, 8, 4]]
    last = LastTokens(rows=torch.arange(NUM_SEQS), batch=decode_step())
    prepared.clear()
    forward(model, last)
    assert [windows for _, windows in prepared] == [[None, 8, 4], [4]]
    assert prepared[1][0] == id(last.batch)


def test_biases_stay_apart(tmp_path: Path, joined: list[bool]) -> None:
    forward(make_model(tmp_path, qkv_bias=True))
    assert not joined


def test_a_shortened_model_joins_the_layers_that_it_has(tmp_path: Path, joined: list[bool]) -> None:
    model = make_model(tmp_path)
    model.layers = shortened(model).layers
    assert len(model.layers) == 2
    forward(model)
    assert joined == [True, False]
