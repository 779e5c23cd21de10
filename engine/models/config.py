"""A model's shape and limits, read from its directory without torch."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from engine.models.fingerprint import fingerprint_model, fingerprint_variant
from engine.models.quantization import (
    Quantization,
    ignoring,
    read_quantization,
    requested_quantization,
)
from engine.models.rope_config import RopeConfig, read_rope_config
from protocol.block_hash import BlockHash, root_hash
from protocol.errors import StartupError

_LINEAR_LAYERS = (
    *(f"self_attn.{name}_proj" for name in "qkvo"),
    *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
)
# What transformers assumes where a config.json leaves these out.
_ARCHITECTURE_DEFAULTS: dict[str, dict[str, Any]] = {
    "MistralForCausalLM": {"num_key_value_heads": 8, "sliding_window": 4096},
    "Qwen2ForCausalLM": {"num_key_value_heads": 32, "sliding_window": 4096},
    "Qwen3ForCausalLM": {"num_key_value_heads": 32, "sliding_window": 4096, "head_dim": 128},
}


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """config.json and generation_config.json in one vocabulary.

    `layer_windows` holds each layer's sliding window in tokens, None for full attention.
    `fingerprint` is equal for equal models on any machine; it roots the hashes of KV blocks.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope: RopeConfig
    layer_windows: tuple[int | None, ...]
    attention_bias: bool
    mlp_bias: bool
    tie_word_embeddings: bool
    max_model_len: int
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None
    dtype: str
    quantization: Quantization | None
    fingerprint: str

    def limited_to(self, max_model_len: int | None) -> "ModelConfig":
        """The same model for sequences up to `max_model_len` tokens (None: all it can do).

        Raises StartupError if that is more than the model supports.
        """
        if max_model_len is None:
            return self
        if max_model_len > self.max_model_len:
            raise StartupError(
                f"--max-model-len {max_model_len} is more than this model's {self.max_model_len} "
                "tokens; lower it, or set rope scaling in the model's config.json."
            )
        return replace(self, max_model_len=max_model_len)

    def quantized(self, method: str | None, ignored: Sequence[str] = ()) -> "ModelConfig":
        """The model that `--quantization` asks for; its KV is never taken for the other's.

        `ignored` is `--quantization-ignore`. Raises StartupError if either doesn't fit the
        checkpoint.
        """
        quantization = requested_quantization(method, self.quantization)
        if ignored:
            quantization = ignoring(ignored, quantization, layers=self._linear_layers())
        if quantization is self.quantization:
            return self
        variant = " but ".join((f"quantized while loading: {method}", *sorted(ignored)))
        fingerprint = fingerprint_variant(self.fingerprint, variant)
        return replace(self, quantization=quantization, fingerprint=fingerprint)

    def _linear_layers(self) -> list[str]:
        layers = (f"model.layers.{layer}" for layer in range(self.num_layers))
        return [f"{layer}.{name}" for layer in layers for name in _LINEAR_LAYERS]

    def uses_long_rope(self, max_seq_len: int) -> bool:
        """Whether a sequence that wants to reach `max_seq_len` tokens takes the long frequencies.

        It does from its first token on, so that its keys never mix two sets of frequencies.
        `max_model_len` ends it anyway, so more than that counts as that.
        """
        switch_len = self.rope.switch_len
        return switch_len is not None and min(max_seq_len, self.max_model_len) > switch_len

    def rope_row_offset(self, max_seq_len: int) -> int:
        """What to add to the positions of such a sequence to index the model's cos/sin table."""
        return self.max_model_len if self.uses_long_rope(max_seq_len) else 0

    def root_hash(
        self, max_seq_len: int, *, cache_salt: str | None = None, kv_dtype: str = ""
    ) -> BlockHash:
        """The parent hash of such a sequence's first block: long and short keys never match, nor
        do those that workers keep in different types (`KVLayout.dtype`)."""
        variant = "/long" if self.uses_long_rope(max_seq_len) else ""
        variant += f"/{kv_dtype}" if kv_dtype else ""
        return root_hash(self.fingerprint + variant, cache_salt=cache_salt)


def read_model_config(model_dir: Path) -> ModelConfig:
    """Raises StartupError where config.json is missing or describes what we can't run."""
    raw = read_json(model_dir / "config.json")
    generation_path = model_dir / "generation_config.json"
    generation = read_json(generation_path) if generation_path.exists() else {}
    try:
        return _model_config(raw, generation, fingerprint_model(model_dir, raw))
    except KeyError as error:
        raise StartupError(f"{model_dir / 'config.json'} lacks {error.args[0]!r}.") from error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of a model directory; raises StartupError if there is none."""
    try:
        value = json.loads(path.read_text())
    except OSError as error:
        raise StartupError(f"Can't read {path}: {error.strerror}.") from error
    except ValueError as error:
        raise StartupError(f"{path} is not valid JSON: {error}.") from error
    if not isinstance(value, dict):
        raise StartupError(f"{path} must hold a JSON object.")
    return value


def _model_config(
    raw: Mapping[str, Any], generation: Mapping[str, Any], fingerprint: str
) -> ModelConfig:
    architecture, has_head = _architecture(raw)
    raw = _ARCHITECTURE_DEFAULTS.get(architecture, {}) | dict(raw)
    _refuse_unsupported(raw)
    num_heads = int(raw["num_attention_heads"])
    head_dim = int(raw.get("head_dim") or raw["hidden_size"] // num_heads)
    num_layers = int(raw["num_hidden_layers"])
    rope = read_rope_config(raw, head_dim)
    return ModelConfig(
        architecture=architecture,
        vocab_size=int(raw["vocab_size"]),
        hidden_size=int(raw["hidden_size"]),
        intermediate_size=int(raw["intermediate_size"]),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=int(raw.get("num_key_value_heads") or num_heads),
        head_dim=head_dim,
        rms_norm_eps=float(raw.get("rms_norm_eps", 1e-6)),
        rope=rope,
        layer_windows=_layer_windows(architecture, raw, num_layers),
        attention_bias=bool(raw.get("attention_bias", False)),
        mlp_bias=bool(raw.get("mlp_bias", False)),
        tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)) or not has_head,
        max_model_len=rope.context_len(int(raw["max_position_embeddings"])),
        eos_token_ids=_eos_token_ids(raw, generation),
        bos_token_id=raw.get("bos_token_id"),
        dtype=str(raw.get("dtype") or raw.get("torch_dtype") or "float32"),
        quantization=read_quantization(raw),
        fingerprint=fingerprint,
    )


def _architecture(raw: Mapping[str, Any]) -> tuple[str, bool]:
    """The served architecture's name, and whether it has a head: models that are made for
    embeddings often lack it, and are named for their body (`MistralModel`)."""
    architectures = raw.get("architectures") or []
    if len(architectures) != 1:
        raise StartupError(f"config.json must name one architecture, it names {architectures}.")
    name: str = architectures[0]
    if name.endswith("Model"):
        return name.removesuffix("Model") + "ForCausalLM", False
    return name, True


def _refuse_unsupported(raw: Mapping[str, Any]) -> None:
    if raw.get("hidden_act", "silu") != "silu":
        raise StartupError(
            f"config.json asks for activation {raw['hidden_act']!r}; only 'silu' is supported."
        )


def _layer_windows(
    architecture: str, raw: Mapping[str, Any], num_layers: int
) -> tuple[int | None, ...]:
    """Mistral's window spans all layers; Qwen's is off unless enabled, and spares early layers."""
    window = raw.get("sliding_window")
    match architecture:
        case "MistralForCausalLM":
            return (window,) * num_layers
        case "Qwen2ForCausalLM" | "Qwen3ForCausalLM" if raw.get("use_sliding_window"):
            layer_types = raw.get("layer_types")
            if layer_types is None:
                first = int(raw.get("max_window_layers", 28))
                return tuple(window if i >= first else None for i in range(num_layers))
            return tuple(window if kind == "sliding_attention" else None for kind in layer_types)
        case _:
            return (None,) * num_layers


def _eos_token_ids(raw: Mapping[str, Any], generation: Mapping[str, Any]) -> tuple[int, ...]:
    """Both files' ids: instruct models often name the end of a turn in the second only."""
    ids: set[int] = set()
    for source in (raw, generation):
        value = source.get("eos_token_id")
        ids.update(value if isinstance(value, list) else [] if value is None else [value])
    return tuple(sorted(ids))
