"""BERT, and RoBERTa and XLM-R, which differ from it in the position of a text's first token."""

from torch import Tensor
from torch.nn import functional as F

from engine.layers.encoder import EncoderLayer, LayerNorm
from engine.models.encoder_config import EncoderConfig
from engine.text_batch import TextBatch
from engine.weights.source import WeightSource

# Saved bare, or as the body of a model with a head.
_PREFIXES = ("", "bert.", "roberta.")


class BertModel:
    """Token, position and type embeddings; layers without causal mask. No pooler: texts' vectors
    are made of the hidden states. Run it under `torch.inference_mode`."""

    def __init__(self, config: EncoderConfig, weights: WeightSource) -> None:
        self.config = config
        self.dtype = weights.dtype
        self.device = weights.device
        size = config.hidden_size
        prefix = _prefix(weights)
        table = f"{prefix}embeddings"
        self._words = weights.take(f"{table}.word_embeddings.weight", (config.vocab_size, size))
        positions = weights.take(f"{table}.position_embeddings.weight", (config.table_len, size))
        types = weights.take(
            f"{table}.token_type_embeddings.weight", (config.num_token_types, size)
        )
        self._norm = LayerNorm(weights, f"{table}.LayerNorm", size, config.layer_norm_eps)
        self._layers = [
            EncoderLayer(config, weights, f"{prefix}encoder.layer.{layer}")
            for layer in range(config.num_layers)
        ]
        # A text is one segment, so its tokens all have the first type.
        self._positions = positions[config.first_position :] + types[0]

    def forward(self, batch: TextBatch) -> Tensor:
        """Hidden states of all tokens, [num_tokens, hidden_size]."""
        embedded = F.embedding(batch.token_ids, self._words)
        hidden = self._norm.forward(embedded + F.embedding(batch.offsets, self._positions))
        for layer in self._layers:
            hidden = layer.forward(hidden, batch)
        return hidden


def _prefix(weights: WeightSource) -> str:
    """What stands before the checkpoint's names."""
    for prefix in _PREFIXES:
        if weights.stored(f"{prefix}embeddings.word_embeddings.weight") is not None:
            return prefix
    return ""
