"""Qwen2 and Qwen2.5."""

from engine.layers.attention import AttentionOptions
from engine.models.config import ModelConfig
from engine.models.decoder import DecoderModel
from engine.weights.source import WeightSource


def qwen2(config: ModelConfig, weights: WeightSource) -> DecoderModel:
    """q, k and v have biases; later layers may attend over a sliding window."""
    attention = [AttentionOptions(qkv_bias=True, window=window) for window in config.layer_windows]
    return DecoderModel(config, weights, attention)
