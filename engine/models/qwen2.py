"""Qwen2 and Qwen2.5."""

from torch import Tensor

from engine.layers.attention import AttentionOptions
from engine.layers.decoder import DecoderLayer, run_layers
from engine.layers.rope import rope_table
from engine.layers.vocabulary import Vocabulary
from engine.models.config import ModelConfig
from engine.weights.source import WeightSource
from kernels.attention import AttentionBatch, LastTokens
from kernels.norm import add_rms_norm


class Qwen2ForCausalLM:
    """q, k and v have biases; later layers may attend over a sliding window."""

    def __init__(self, config: ModelConfig, weights: WeightSource) -> None:
        self.config = config
        self.dtype = weights.dtype
        self.device = weights.device
        self._cos_sin = rope_table(config.rope, config.max_model_len, weights.device)
        self._vocabulary = Vocabulary(config, weights)
        self.layers = [
            DecoderLayer(
                config,
                layer,
                weights,
                attention=AttentionOptions(qkv_bias=True, window=config.layer_windows[layer]),
            )
            for layer in range(config.num_layers)
        ]
        self._norm = weights.take("model.norm.weight", (config.hidden_size,))

    def forward(
        self,
        token_ids: Tensor,
        batch: AttentionBatch,
        kv_pool: Tensor,
        last: LastTokens | None = None,
    ) -> Tensor:
        embedded = self._vocabulary.embed(token_ids)
        output, residual = run_layers(self.layers, embedded, self._cos_sin, batch, kv_pool, last)
        return add_rms_norm(output, residual, self._norm, self.config.rms_norm_eps)[0]

    def logits(self, hidden: Tensor) -> Tensor:
        return self._vocabulary.logits(hidden)
