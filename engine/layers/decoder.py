"""The layer that all served architectures stack: pre-norm attention, then a pre-norm MLP."""

from collections.abc import Hashable

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

    @property
    def kind(self) -> Hashable:
        """As that of projections."""
        return self._attention.kind, self._mlp.kind

    def forward(
        self,
        output: Tensor | None,
        residual: Tensor,
        cos_sin: Tensor,
        batch: AttentionBatch,
        kv_pool: Tensor,
    ) -> tuple[Tensor | None, Tensor]:
        """Take and return (the last output, None once it is added; the residual stream).

        What the product that makes an output doesn't add on its way is left to the next norm, so
        that it is no pass over memory of its own. The inputs are overwritten.
        """
        normed, residual = self._attention.qkv.normed(output, residual, self._input_norm, self._eps)
        output = self._attention.forward(normed, residual, cos_sin, batch, kv_pool)
        normed, residual = self._mlp.gate_up.normed(output, residual, self._mlp_norm, self._eps)
        return self._mlp.forward(normed, residual), residual

    def store_kv(
        self,
        output: Tensor | None,
        residual: Tensor,
        cos_sin: Tensor,
        batch: AttentionBatch,
        kv_pool: Tensor,
    ) -> Tensor:
        """Only what others attend to. Returns the residual stream that `forward` takes, with no
        output left to add; the inputs are overwritten."""
        normed, residual = self._attention.qkv.normed(output, residual, self._input_norm, self._eps)
        self._attention.store_kv(normed, cos_sin, batch, kv_pool)
        return residual
