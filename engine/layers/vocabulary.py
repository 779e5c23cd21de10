"""Both ends of a model: token ids to vectors and vectors to logits, over one table if tied."""

from torch import Tensor

from engine.models.config import ModelConfig
from engine.weights.fp8 import take_dense
from engine.weights.source import WeightSource
from kernels.linear import PackedLinear, linear, pack_linear


class Vocabulary:
    """Input embedding and output projection, [vocab_size, hidden_size] each."""

    def __init__(self, config: ModelConfig, weights: WeightSource) -> None:
        shape = (config.vocab_size, config.hidden_size)
        self._embedding: PackedLinear = pack_linear(
            take_dense(weights, "model.embed_tokens", shape)
        )
        self._head = (
            self._embedding
            if config.tie_word_embeddings
            else pack_linear(take_dense(weights, "lm_head", shape))
        )

    def embed(self, token_ids: Tensor) -> Tensor:
        """`token_ids` [num_tokens] to [num_tokens, hidden_size]."""
        return self._embedding.embed(token_ids)

    def logits(self, hidden: Tensor) -> Tensor:
        """`hidden` [num_rows, hidden_size] to [num_rows, vocab_size], in the model's dtype."""
        return linear(hidden, self._head)
