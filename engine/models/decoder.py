"""A decoder of equal layers, which differ in their attention alone: all served architectures."""

from collections.abc import Iterable, Sequence

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
        output, residual = None, self._vocabulary.embed(token_ids)
        if last is None and self._joins_products(residual):
            self._forward_joined(residual, batch, kv_pool)
            return add_rms_norm(None, residual, self._norm, self.config.rms_norm_eps)[0]
        *layers, last_layer = self.layers
        for layer in layers:
            output, residual = layer.forward(output, residual, self._cos_sin, batch, kv_pool)
        if last is not None:
            # All that anybody needs of the others now is what will be attended to.
            residual = last_layer.store_kv(output, residual, self._cos_sin, batch, kv_pool)
            output, residual, batch = None, residual.index_select(0, last.rows), last.batch
        output, residual = last_layer.forward(output, residual, self._cos_sin, batch, kv_pool)
        return add_rms_norm(output, residual, self._norm, self.config.rms_norm_eps)[0]

    def _joins_products(self, residual: Tensor) -> bool:
        """Whether each layer's products, and the next one's, run as one kernel."""
        num_tokens, dtype = len(residual), residual.dtype
        return all(
            layer.joins_products(following, num_tokens, dtype)
            for layer, following in self._with_following()
        )

    def _forward_joined(self, residual: Tensor, batch: AttentionBatch, kv_pool: Tensor) -> None:
        projected: Tensor | None = self.layers[0].project(residual)
        for layer, following in self._with_following():
            assert projected is not None
            projected = layer.forward_joined(
                projected, residual, self._cos_sin, batch, kv_pool, following
            )

    def _with_following(self) -> Iterable[tuple[DecoderLayer, DecoderLayer | None]]:
        return zip(self.layers, [*self.layers[1:], None], strict=True)

    def logits(self, hidden: Tensor) -> Tensor:
        return self._vocabulary.logits(hidden)
