"""Mistral 7B and its successors without experts."""

from engine.layers.attention import AttentionOptions
from engine.models.config import ModelConfig
from engine.models.decoder import DecoderModel
from engine.weights.source import WeightSource


def mistral(config: ModelConfig, weights: WeightSource) -> DecoderModel:
    """Llama's layer; attention reaches back over a sliding window if the checkpoint has one."""
    attention = [AttentionOptions(window=window) for window in config.layer_windows]
    return DecoderModel(config, weights, attention)
