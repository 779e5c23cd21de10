"""GGUF's names for architectures, sizes and tensors, in Hugging Face's terms."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

from protocol.errors import StartupError

_TOP_TENSORS = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER_TENSORS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_LAYER_NAME = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")
# RoPE divisors that llama.cpp computed from the config's llama3 scaling, not weights of the model.
_ROPE_FREQS = "rope_freqs.weight"
# Llama 3.1's and 3.2's; the file keeps only the divisors that result.
_LLAMA3_LOW, _LLAMA3_HIGH, _LLAMA3_ORIGINAL_LEN = 1.0, 4.0, 8192


@dataclass(frozen=True, slots=True)
class GgufArchitecture:
    """`key` prefixes the metadata; `permutes_qk` where llama.cpp reordered q and k for its RoPE."""

    key: str
    hf_architecture: str
    hf_model_type: str
    permutes_qk: bool

    def hf_name(self, name: str) -> str | None:
        """A tensor's name in Hugging Face's models; None for one that isn't a weight there."""
        if name == _ROPE_FREQS:
            return None
        if name in _TOP_TENSORS:
            return _TOP_TENSORS[name]
        match = _LAYER_NAME.fullmatch(name)
        if match is None or match[2] not in _LAYER_TENSORS:
            raise StartupError(
                f"The GGUF file has a tensor {name!r} that {self.key} has no use for."
            )
        return f"model.layers.{match[1]}.{_LAYER_TENSORS[match[2]]}.{match[3]}"

    def permuted_heads(self, hf_name: str, config: Mapping[str, Any]) -> int | None:
        """Heads of a q or k tensor whose rows llama.cpp reordered; None for all others."""
        if not self.permutes_qk:
            return None
        if ".q_proj." in hf_name:
            return config["num_attention_heads"]
        return config["num_key_value_heads"] if ".k_proj." in hf_name else None


_ARCHITECTURES = {
    architecture.key: architecture
    for architecture in (
        GgufArchitecture("llama", "LlamaForCausalLM", "llama", permutes_qk=True),
        GgufArchitecture("qwen2", "Qwen2ForCausalLM", "qwen2", permutes_qk=False),
        GgufArchitecture("qwen3", "Qwen3ForCausalLM", "qwen3", permutes_qk=False),
    )
}


class Metadata(dict[str, Any]):
    """A GGUF file's metadata; reading what it lacks with `[]` raises StartupError."""

    def __missing__(self, key: str) -> Any:  # noqa: ANN401
        raise StartupError(f"The GGUF file's metadata lacks {key!r}.")


def read_architecture(metadata: Mapping[str, Any]) -> GgufArchitecture:
    """Raises StartupError for one that isn't served."""
    key = metadata["general.architecture"]
    if key not in _ARCHITECTURES:
        raise StartupError(
            f"The GGUF file holds a {key!r} model; importable are {', '.join(_ARCHITECTURES)}."
        )
    return _ARCHITECTURES[key]


def hf_config(
    architecture: GgufArchitecture,
    metadata: Mapping[str, Any],
    tensors: Mapping[str, gguf.ReaderTensor],
) -> dict[str, Any]:
    """config.json's content; raises StartupError for what isn't supported."""

    def read(name: str) -> Any:  # noqa: ANN401  (metadata values are of any type)
        return metadata[f"{architecture.key}.{name}"]

    num_heads = read("attention.head_count")
    hidden_size = read("embedding_length")
    return {
        "architectures": [architecture.hf_architecture],
        "model_type": architecture.hf_model_type,
        "dtype": "bfloat16",
        "vocab_size": len(metadata["tokenizer.ggml.tokens"]),
        "hidden_size": hidden_size,
        "intermediate_size": read("feed_forward_length"),
        "num_hidden_layers": read("block_count"),
        "num_attention_heads": num_heads,
        "num_key_value_heads": metadata.get(
            f"{architecture.key}.attention.head_count_kv", num_heads
        ),
        "head_dim": metadata.get(
            f"{architecture.key}.attention.key_length", hidden_size // num_heads
        ),
        "hidden_act": "silu",
        "max_position_embeddings": read("context_length"),
        "rms_norm_eps": _shortest_float32(read("attention.layer_norm_rms_epsilon")),
        "rope_theta": metadata.get(f"{architecture.key}.rope.freq_base", 10_000.0),
        "rope_scaling": _rope_scaling(architecture, metadata, tensors),
        "attention_bias": "blk.0.attn_q.bias" in tensors,
        "tie_word_embeddings": "output.weight" not in tensors,
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": metadata.get("tokenizer.ggml.eos_token_id"),
        "pad_token_id": metadata.get("tokenizer.ggml.padding_token_id"),
    }


def _shortest_float32(value: float) -> float:
    """1e-05 for the 9.999999747378752e-06 that a float32 makes of it."""
    return float(str(np.float32(value)))


def _rope_scaling(
    architecture: GgufArchitecture,
    metadata: Mapping[str, Any],
    tensors: Mapping[str, gguf.ReaderTensor],
) -> dict[str, Any] | None:
    if _ROPE_FREQS in tensors:
        theta = metadata.get(f"{architecture.key}.rope.freq_base", 10_000.0)
        return _llama3_scaling(tensors[_ROPE_FREQS].data, theta)
    prefix = f"{architecture.key}.rope.scaling"
    match metadata.get(f"{prefix}.type", "none"):
        case "none":
            return None
        case "linear":
            return {"rope_type": "linear", "factor": metadata[f"{prefix}.factor"]}
        case "yarn":
            return {
                "rope_type": "yarn",
                "factor": metadata[f"{prefix}.factor"],
                "original_max_position_embeddings": metadata[f"{prefix}.original_context_length"],
            }
        case other:
            raise StartupError(f"The GGUF file asks for rope scaling {other!r}.")


def _llama3_scaling(divisors: NDArray[np.float32], theta: float) -> dict[str, Any]:
    """The llama3 scaling that yields a file's RoPE divisors; the lowest frequency has it all."""
    factor = float(divisors.max())
    periods = _LLAMA3_ORIGINAL_LEN / (
        2 * np.pi * theta ** (np.arange(divisors.size) / divisors.size)
    )
    kept = np.clip((periods - _LLAMA3_LOW) / (_LLAMA3_HIGH - _LLAMA3_LOW), 0.0, 1.0)
    if not np.allclose(divisors, 1.0 / ((1 - kept) / factor + kept), rtol=1e-3):
        raise StartupError("The GGUF file's RoPE divisors are not those of Llama 3's scaling.")
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": _LLAMA3_LOW,
        "high_freq_factor": _LLAMA3_HIGH,
        "original_max_position_embeddings": _LLAMA3_ORIGINAL_LEN,
    }
