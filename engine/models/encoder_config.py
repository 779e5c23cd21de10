"""An encoder's shape and limits, read from its directory without torch.

An encoder (BERT and its kin) reads a text from both sides at once and generates nothing: what it's
served for is vectors.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from engine.models.config import read_json
from engine.models.fingerprint import fingerprint_model
from protocol.errors import StartupError

Activation = Literal["gelu", "gelu_tanh", "relu"]

# RoBERTa's positions start behind the padding token's id, wherever that is.
_FAMILIES = {"Bert": "bert", "Roberta": "roberta", "XLMRoberta": "roberta"}
ENCODER_ARCHITECTURES = tuple(
    f"{family}{suffix}" for family in _FAMILIES for suffix in ("Model", "ForMaskedLM")
)
_ACTIVATIONS: dict[str, Activation] = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}


@dataclass(frozen=True, slots=True)
class EncoderConfig:
    """config.json in our vocabulary; `num_positions` is what the weights can do, `max_model_len`
    what is served. A text's first token is at `first_position` of the position table."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    layer_norm_eps: float
    activation: Activation
    table_len: int
    first_position: int
    num_token_types: int
    max_model_len: int
    dtype: str
    fingerprint: str

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def num_positions(self) -> int:
        """Tokens of the longest text that the model has positions for."""
        return self.table_len - self.first_position

    def limited_to(self, max_model_len: int | None) -> "EncoderConfig":
        """The same model for texts up to `max_model_len` tokens (None: what its makers say).

        Raises StartupError if that is more than there are positions.
        """
        if max_model_len is None:
            return self
        if max_model_len > self.num_positions:
            raise StartupError(
                f"--max-model-len {max_model_len} is more than this model's {self.num_positions} "
                "positions; lower it."
            )
        return replace(self, max_model_len=max_model_len)


def is_encoder(model_dir: Path) -> bool:
    """Whether the directory's model only embeds. Raises StartupError without a config.json."""
    architectures = read_json(model_dir / "config.json").get("architectures") or []
    return len(architectures) == 1 and architectures[0] in ENCODER_ARCHITECTURES


def read_encoder_config(model_dir: Path) -> EncoderConfig:
    """Raises StartupError where config.json describes what we can't run."""
    path = model_dir / "config.json"
    raw = read_json(path)
    if not is_encoder(model_dir):
        raise StartupError(
            f"{path} names architecture {raw.get('architectures')}, which is no encoder; "
            f"encoders served are {', '.join(ENCODER_ARCHITECTURES)}."
        )
    try:
        config = _encoder_config(raw, fingerprint_model(model_dir, raw))
    except KeyError as error:
        raise StartupError(f"{path} lacks {error.args[0]!r}.") from error
    return replace(config, max_model_len=_max_model_len(model_dir, config.num_positions))


def _encoder_config(raw: Mapping[str, Any], fingerprint: str) -> EncoderConfig:
    architecture: str = raw["architectures"][0]
    family = _FAMILIES[architecture.removesuffix("Model").removesuffix("ForMaskedLM")]
    _refuse_unsupported(raw)
    # transformers' own defaults, where a config.json leaves these out.
    is_roberta = family == "roberta"
    pad_token_id = raw.get("pad_token_id")
    first_position = (1 if pad_token_id is None else int(pad_token_id)) + 1 if is_roberta else 0
    table_len = int(raw["max_position_embeddings"])
    return EncoderConfig(
        architecture=architecture,
        vocab_size=int(raw["vocab_size"]),
        hidden_size=int(raw["hidden_size"]),
        intermediate_size=int(raw["intermediate_size"]),
        num_layers=int(raw["num_hidden_layers"]),
        num_heads=int(raw["num_attention_heads"]),
        layer_norm_eps=float(raw.get("layer_norm_eps", 1e-12)),
        activation=_ACTIVATIONS[raw.get("hidden_act", "gelu")],
        table_len=table_len,
        first_position=first_position,
        num_token_types=int(raw.get("type_vocab_size", 2)),
        max_model_len=table_len - first_position,
        dtype=str(raw.get("dtype") or raw.get("torch_dtype") or "float32"),
        fingerprint=fingerprint,
    )


def _refuse_unsupported(raw: Mapping[str, Any]) -> None:
    activation = raw.get("hidden_act", "gelu")
    if activation not in _ACTIVATIONS:
        raise StartupError(
            f"config.json asks for activation {activation!r}; an encoder's may be "
            f"{', '.join(_ACTIVATIONS)}."
        )
    positions = raw.get("position_embedding_type", "absolute")
    if positions != "absolute":
        raise StartupError(
            f"config.json asks for {positions!r} position embeddings; an encoder's are absolute."
        )
    if raw.get("is_decoder"):
        raise StartupError("config.json says `is_decoder`; served are encoders of this kind only.")
    if raw.get("quantization_config"):
        raise StartupError("config.json names a quantization; encoders are served unquantized.")


def _max_model_len(model_dir: Path, num_positions: int) -> int:
    """What sentence-transformers cuts texts to, if the model's makers say so; else all it can."""
    path = model_dir / "sentence_bert_config.json"
    wanted = read_json(path).get("max_seq_length") if path.is_file() else None
    return num_positions if wanted is None else min(int(wanted), num_positions)
