"""A decoder of equal layers, but for attention and number formats: all served architectures."""

from collections.abc import Sequence

from torch import Tensor

from engine.layers.attention import AttentionOptions
from engine.layers.decoder import DecoderLayer
from engine.layers.rope import rope_table
from engine.layers.vocabulary import Vocabulary
from engine.models.config import ModelConfig
from engine.weights.source import WeightSource
from kernels.attention import AttentionBatch, LastTokens, prepare
from kernels.norm import add_rms_norm


class DecoderModel:
    """Embedding, layers, norm and head; see `CausalLM`."""

    def __init__(
        self,
        config: ModelConfig,
        weights: WeightSource,
        attention: Sequence[AttentionOptions],
        *,
        mlp_bias: bool = False,
    ) -> None:
        """`attention` is each layer's."""
        self.config = config
        self.dtype = weights.dtype
        self.device = weights.device
        self._cos_sin = rope_table(config.rope, config.max_model_len, weights.device)
        self._vocabulary = Vocabulary(config, weights)
        self.layers = [
            DecoderLayer(config, layer, weights, attention=options, mlp_bias=mlp_bias)
            for layer, options in enumerate(attention)
        ]
        self._norm = weights.take("model.norm.weight", (config.hidden_size,))

    def forward(
        self,
        token_ids: Tensor,
        batch: AttentionBatch,
        kv_pool: Tensor,
        last: LastTokens | None = None,
    ) -> Tensor:
        prepare(batch, kv_pool, self.config.layer_windows)
        if last is not None:
            prepare(last.batch, kv_pool, self.config.layer_windows[-1:])
        residual = self._vocabulary.embed(token_ids)
        if last is None:
            output, residual = self._forward_all(residual, batch, kv_pool)
        else:
            output, residual = self._forward_to_last(residual, batch, kv_pool, last)
        return add_rms_norm(output, residual, self._norm, self.config.rms_norm_eps)[0]

    def _forward_all(
        self, residual: Tensor, batch: AttentionBatch, kv_pool: Tensor
    ) -> tuple[Tensor | None, Tensor]:
        """Returns what a layer's `forward` does. Where a layer joins its products they run as one
        kernel, with the next one's if that does, too."""
        output = projected = None
        following = self._following(residual)
        for layer in self.layers:
            if layer not in following:
                output, residual = layer.forward(output, residual, self._cos_sin, batch, kv_pool)
                continue
            if projected is None:
                projected, residual = layer.project(output, residual)
            projected = layer.forward_joined(
                projected, residual, self._cos_sin, batch, kv_pool, following[layer]
            )
            output = None
        return output, residual

    def _following(self, residual: Tensor) -> dict[DecoderLayer, DecoderLayer | None]:
        """For each layer that joins its products the one behind it, if that is another."""
        found: dict[DecoderLayer, DecoderLayer | None] = {}
        following = None
        for layer in reversed(self.layers):
            if layer.joins_products(following, len(residual), residual.dtype):
                found[layer] = following
                following = layer
            else:
                following = None
        return found

    def _forward_to_last(
        self, residual: Tensor, batch: AttentionBatch, kv_pool: Tensor, last: LastTokens
    ) -> tuple[Tensor | None, Tensor]:
        """Returns what a layer's `forward` does, of the last tokens."""
        output = None
        *layers, last_layer = self.layers
        for layer in layers:
            output, residual = layer.forward(output, residual, self._cos_sin, batch, kv_pool)
        # All that anybody needs of the others now is what will be attended to.
        residual = last_layer.store_kv(output, residual, self._cos_sin, batch, kv_pool)
        residual = residual.index_select(0, last.rows)
        return last_layer.forward(None, residual, self._cos_sin, last.batch, kv_pool)

    def logits(self, hidden: Tensor) -> Tensor:
        return self._vocabulary.logits(hidden)
