"""Qwen3, the dense sizes."""

from engine.layers.attention import AttentionOptions
from engine.models.config import ModelConfig
from engine.models.decoder import DecoderModel
from engine.weights.source import WeightSource


def qwen3(config: ModelConfig, weights: WeightSource) -> DecoderModel:
    """Each head's q and k are normalised before RoPE."""
    attention = [
        AttentionOptions(
            qkv_bias=config.attention_bias,
            output_bias=config.attention_bias,
            qk_norm=True,
            window=window,
        )
        for window in config.layer_windows
    ]
    return DecoderModel(config, weights, attention)
