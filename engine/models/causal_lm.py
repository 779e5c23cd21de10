"""What the runner asks of a model."""

from typing import Protocol

import torch
from torch import Tensor

from engine.layers.decoder import DecoderLayer
from engine.models.config import ModelConfig
from kernels.attention import AttentionBatch, LastTokens


class CausalLM(Protocol):
    """A decoder whose keys and values live in a paged pool. Run it under `torch.inference_mode`."""

    layers: list[DecoderLayer]

    @property
    def config(self) -> ModelConfig: ...

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def device(self) -> torch.device: ...

    def forward(
        self,
        token_ids: Tensor,
        batch: AttentionBatch,
        kv_pool: Tensor,
        last: LastTokens | None = None,
    ) -> Tensor:
        """Hidden states after the last norm, [num_tokens, hidden_size], or those of `last` alone,
        [num_seqs, hidden_size], which is the last layer's work for all others saved.

        `token_ids` are the step's new tokens, int64 [num_tokens], sequence after sequence as
        `batch` says; `kv_pool` is [num_blocks, num_layers, 2, num_kv_heads, block_size, head_dim].
        """
        ...

    def logits(self, hidden: Tensor) -> Tensor:
        """`hidden` [num_rows, hidden_size] to [num_rows, vocab_size], in the model's dtype."""
        ...
