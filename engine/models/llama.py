"""Llama 2, 3, 3.1 and 3.2, and models of their shape such as SmolLM2."""

from engine.layers.attention import AttentionOptions
from engine.models.config import ModelConfig
from engine.models.decoder import DecoderModel
from engine.weights.source import WeightSource


def llama(config: ModelConfig, weights: WeightSource) -> DecoderModel:
    """Full attention; biases are the checkpoint's choice."""
    options = AttentionOptions(qkv_bias=config.attention_bias, output_bias=config.attention_bias)
    attention = [options] * config.num_layers
    return DecoderModel(config, weights, attention, mlp_bias=config.mlp_bias)
