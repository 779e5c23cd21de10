"""The layer that all served architectures stack: pre-norm attention, then a pre-norm MLP."""

from torch import Tensor

from engine.layers.attention import Attention, AttentionOptions
from engine.layers.mlp import GatedMLP
from engine.models.config import ModelConfig
from engine.weights.source import WeightSource
from kernels.attention import AttentionBatch


class DecoderLayer:
    """Adds attention's and the MLP's outputs to the residual stream."""

    def __init__(
        self,
        config: ModelConfig,
        layer: int,
        weights: WeightSource,
        *,
        attention: AttentionOptions,
        mlp_bias: bool = False,
    ) -> None:
        prefix = f"model.layers.{layer}"
        shape = (config.hidden_size,)
        self._eps = config.rms_norm_eps
        self._input_norm = weights.take(f"{prefix}.input_layernorm.weight", shape)
        self._attention = Attention(config, layer, weights, options=attention)
        self._mlp_norm = weights.take(f"{prefix}.post_attention_layernorm.weight", shape)
        self._mlp = GatedMLP(config, layer, weights, bias=mlp_bias)

    def forward(
        self,
        hidden: Tensor,
        residual: Tensor,
        cos_sin: Tensor,
        batch: AttentionBatch,
        kv_pool: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Take and return (the last output, not yet added; the residual stream before it).

        Leaving the addition to the next norm makes it one pass over memory; the inputs are
        overwritten.
        """
        normed, residual = self._attention.qkv.normed(hidden, residual, self._input_norm, self._eps)
        attended = self._attention.forward(normed, cos_sin, batch, kv_pool)
        normed, residual = self._mlp.gate_up.normed(attended, residual, self._mlp_norm, self._eps)
        return self._mlp.forward(normed), residual
