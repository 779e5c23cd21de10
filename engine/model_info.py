"""What the rest of a worker needs to know about the loaded model; imports no torch."""

from dataclasses import dataclass

from protocol.layout import KVLayout


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """`max_model_len` bounds prompt and output together, in tokens. `fingerprint` is equal for
    equal models on any machine; `layout` has no layers if the model only embeds."""

    name: str
    architecture: str
    fingerprint: str
    layout: KVLayout
    max_model_len: int
    vocab_size: int
    hidden_size: int
    eos_token_ids: tuple[int, ...]
