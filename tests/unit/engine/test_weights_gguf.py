"""Small GGUF files written as llama.cpp's converter does, imported, and run by transformers."""

import math
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers
from numpy.typing import NDArray
from tokenizers import Tokenizer
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoModelForCausalLM

from engine.models.config import read_model_config
from engine.models.rope_config import Llama3Scaling
from engine.weights.gguf_tokenizer import write_tokenizer
from engine.weights.model_dir import resolve_model
from protocol.errors import StartupError

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
HEADS, KV_HEADS, HIDDEN, INTERMEDIATE, THETA = 4, 2, 256, 256, 50_000.0
BYTES = sorted(ByteLevel.alphabet())
TOKENS = ["<|end|>", "<|user|>", *BYTES, "Ġt", "he", "Ġthe"]
Q = gguf.GGMLQuantizationType


def gguf_name(name: str) -> str:
    if name.startswith("model.layers."):
        _, _, layer, rest = name.split(".", 3)
        module, _, kind = rest.rpartition(".")
        return f"blk.{layer}.{NAMES[module]}.{kind}"
    module, _, kind = name.rpartition(".")
    return f"{NAMES[module]}.{kind}"


def interleave(values: NDArray[np.float32], num_heads: int) -> NDArray[np.float32]:
    """Rows from RoPE halves to llama.cpp's neighbouring pairs."""
    halves = values.reshape(num_heads, 2, -1, *values.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(values.shape))


def write_gguf(
    path: Path, family: str, *, quantization: Q = Q.F32, skip: str = "", **overrides: Any
) -> Any:
    """A random model of `family` as a GGUF file; returns it in transformers' form."""
    torch.manual_seed(3)
    config = getattr(transformers, f"{family}Config")(
        vocab_size=len(TOKENS),
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        max_position_embeddings=128,
        rms_norm_eps=1e-5,
        rope_theta=THETA,
        bos_token_id=None,
        eos_token_id=0,
        **({"head_dim": 64} | overrides),
    )
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    key = family.lower()
    writer = gguf.GGUFWriter(path, key)
    writer.add_block_count(2)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INTERMEDIATE)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_key_length(64)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(THETA)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    if skip != "tokens":
        writer.add_token_list(TOKENS)
    writer.add_token_types([3, 3] + [1] * (len(TOKENS) - 2))
    writer.add_token_merges(["Ġ t", "h e", "Ġt he"])
    writer.add_eos_token_id(0)
    for name, parameter in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        with torch.no_grad():
            if name.endswith((".bias", "norm.weight")):
                parameter.uniform_(0.5, 1.5)
            # What the file can hold exactly survives both quantization and bfloat16.
            values = parameter.bfloat16().float().numpy()
            kind = quantization if values.ndim == 2 else Q.F32
            values = gguf.dequantize(gguf.quantize(values, kind), kind)
            parameter.copy_(torch.from_numpy(values).bfloat16())
        if family == "Llama" and ".q_proj." in name:
            values = interleave(values, HEADS)
        if family == "Llama" and ".k_proj." in name:
            values = interleave(values, KV_HEADS)
        writer.add_tensor(gguf_name(name), gguf.quantize(values, kind), raw_dtype=kind)
    if "rope_parameters" in overrides:
        writer.add_tensor("rope_freqs.weight", llama3_divisors(overrides["rope_parameters"]))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


def llama3_divisors(parameters: dict[str, Any]) -> NDArray[np.float32]:
    divisors: list[float] = []
    for i in range(32):
        wavelength = 2 * math.pi * THETA ** (2 * i / 64)
        smooth = (8192 / wavelength - 1.0) / (4.0 - 1.0)
        if smooth > 1:
            divisors.append(1.0)
        elif smooth < 0:
            divisors.append(parameters["factor"])
        else:
            divisors.append(1 / ((1 - smooth) / parameters["factor"] + smooth))
    return np.array(divisors, dtype=np.float32)


@pytest.mark.parametrize(
    ("family", "quantization", "overrides"),
    [
        ("Llama", Q.F32, {}),
        ("Llama", Q.F16, {"tie_word_embeddings": True}),
        ("Llama", Q.Q8_0, {}),
        ("Llama", Q.Q4_1, {}),
        ("Qwen2", Q.Q5_0, {}),
        ("Qwen3", Q.BF16, {}),
    ],
)
def test_imported_weights_equal_the_originals(
    tmp_path: Path, family: str, quantization: Q, overrides: dict[str, Any]
) -> None:
    path = tmp_path / "model.gguf"
    original = write_gguf(path, family, quantization=quantization, **overrides)
    target = resolve_model(str(path), cache_dir=tmp_path / "cache", progress=False)
    imported = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32)
    ours, theirs = imported.state_dict(), original.state_dict()
    assert ours.keys() == theirs.keys()
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], atol=0, rtol=0, msg=name)
    token_ids = torch.arange(1, 60)[None]
    with torch.inference_mode():
        torch.testing.assert_close(imported(token_ids).logits, original(token_ids).logits)


def test_llama3_scaling_from_its_divisors(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    parameters = {
        "rope_type": "llama3",
        "rope_theta": THETA,
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    write_gguf(path, "Llama", rope_parameters=parameters)
    target = resolve_model(str(path), cache_dir=tmp_path / "cache", progress=False)
    assert read_model_config(target).rope.scaling == Llama3Scaling(32.0, 1.0, 4.0, 8192)


def test_missing_metadata_is_named(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_gguf(path, "Llama", skip="tokens")
    with pytest.raises(StartupError, match=r"metadata lacks 'tokenizer\.ggml\.tokens'"):
        resolve_model(str(path), cache_dir=tmp_path / "cache", progress=False)


def test_unknown_architecture(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "rwkv7")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(StartupError, match="'rwkv7' model; importable are llama, qwen2, qwen3"):
        resolve_model(str(path), cache_dir=tmp_path / "cache", progress=False)


def test_sentencepiece_joins_the_best_scoring_neighbours(tmp_path: Path) -> None:
    pieces = ["<unk>", "<s>", "</s>", "<0xC3>", "<0xA9>", "▁", "a", "b", "c", "ab", "bc", "▁a"]
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": pieces,
        "tokenizer.ggml.token_type": [2, 3, 3, 6, 6] + [1] * 7,
        # "bc" scores better than "ab", and "▁a" worst of the three.
        "tokenizer.ggml.scores": [0.0] * 5 + [-9.0] * 4 + [-2.0, -1.0, -3.0],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }
    write_tokenizer(metadata, tmp_path)
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert tokenizer.encode("abc").tokens == ["<s>", "▁a", "bc"]
    assert tokenizer.encode("aé").tokens == ["<s>", "▁a", "<0xC3>", "<0xA9>"]
    assert tokenizer.decode(tokenizer.encode("abc aé b").ids) == "abc aé b"
