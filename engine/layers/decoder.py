"""The layer that all served architectures stack: pre-norm attention, then a pre-norm MLP."""

from collections.abc import Hashable

import torch
from torch import Tensor

from engine.layers.attention import Attention, AttentionOptions
from engine.layers.mlp import GatedMLP
from engine.layers.projection import Fp8Projection, Projection
from engine.models.config import ModelConfig
from engine.weights.source import WeightSource
from kernels.attention import AttentionBatch
from kernels.fp8 import Fp8Rows
from kernels.layer import LayerWeights, NextWeights, joined_products, joins_products


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
        qkv, output, gate_up, down = map(
            _plain_rows,
            (self._attention.qkv, self._attention.output, self._mlp.gate_up, self._mlp.down),
        )
        self.before_attention: NextWeights | None = None
        if qkv is not None:
            self.before_attention = NextWeights(self._input_norm, qkv)
        self._behind_attention: LayerWeights | None = None
        if output is not None and gate_up is not None and down is not None:
            self._behind_attention = LayerWeights(output, self._mlp_norm, gate_up, down)

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

    def joins_products(
        self, following: "DecoderLayer | None", num_tokens: int, dtype: torch.dtype
    ) -> bool:
        """Whether `forward_joined` can stand in for `forward`, and should."""
        if self._behind_attention is None or self.before_attention is None:
            return False
        return joins_products(self._behind_attention, _before(following), num_tokens, dtype)

    def project(self, output: Tensor | None, residual: Tensor) -> tuple[Tensor, Tensor]:
        """Takes what `forward` does; returns the queries, keys and values that `forward_joined`
        takes, for layers behind those that don't join, and the residual stream."""
        normed, residual = self._attention.qkv.normed(output, residual, self._input_norm, self._eps)
        return self._attention.qkv.forward(normed), residual

    def forward_joined(
        self,
        projected: Tensor,
        residual: Tensor,
        cos_sin: Tensor,
        batch: AttentionBatch,
        kv_pool: Tensor,
        following: "DecoderLayer | None",
    ) -> Tensor | None:
        """`forward` from its own queries, keys and values to those of the layer that is
        `following`, None if none is that joins; outputs go to the residual stream."""
        assert self._behind_attention is not None
        attended = self._attention.attend(projected, cos_sin, batch, kv_pool)
        return joined_products(
            attended, residual, self._behind_attention, _before(following), self._eps
        )

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


def _before(following: DecoderLayer | None) -> NextWeights | None:
    return None if following is None else following.before_attention


def _plain_rows(projection: Projection) -> Fp8Rows | None:
    """Its weight of 8 bits, if that is all there is to it."""
    if not isinstance(projection, Fp8Projection):
        return None
    packed = projection.packed
    return packed.weight if packed.bias is None and packed.input_scale is None else None
