"""A Llama of two small layers with the built-in model's tokenizer, for random weights."""

import json
from pathlib import Path

from engine.weights.model_dir import resolve_model

_SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
}


def write_tiny_llama(target: Path) -> Path:
    """Fills the empty directory `target`, but for weights: load it with `load_format="dummy"`."""
    built_in = resolve_model(None, progress=False)
    for source in built_in.iterdir():
        if source.suffix != ".safetensors" and source.name != "config.json":
            (target / source.name).symlink_to(source)
    config = json.loads((built_in / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | _SHAPE))
    return target
