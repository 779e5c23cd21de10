"""Multi-head attention with grouped keys and values in the paged pool."""

from collections.abc import Hashable
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.layers.projection import (
    PART_MULTIPLE,
    Projection,
    ProjectionInput,
    load_projection,
)
from engine.models.config import ModelConfig
from engine.weights.source import WeightSource
from kernels.attention import AttentionBatch
from kernels.kv_format import KVScales
from kernels.norm import HeadNorms
from kernels.rope import rope_and_store_kv
from kernels.rotated_attention import rotate_and_attend

# On a GPU, products of so many tokens have kernels of their own for each shape of weights: leaving
# queries out gains less than it takes to compile another.
_FEW_TOKENS = 256


@dataclass(frozen=True, slots=True)
class AttentionOptions:
    """In what architectures differ. `window` is a sliding window in tokens, None for all."""

    qkv_bias: bool = False
    output_bias: bool = False
    qk_norm: bool = False
    window: int | None = None


class Attention:
    """One fused projection to q, k and v; RoPE; attention; output projection."""

    def __init__(
        self,
        config: ModelConfig,
        layer: int,
        weights: WeightSource,
        *,
        options: AttentionOptions,
    ) -> None:
        self._layer = layer
        self._num_heads = config.num_heads
        self._num_kv_heads = config.num_kv_heads
        self._head_dim = config.head_dim
        self._scale = config.head_dim**-0.5
        self._window = options.window
        prefix = f"model.layers.{layer}.self_attn"
        q_size = config.num_heads * config.head_dim
        kv_size = config.num_kv_heads * config.head_dim
        self.qkv: Projection = load_projection(
            weights,
            prefix,
            {"q_proj": q_size, "k_proj": kv_size, "v_proj": kv_size},
            config.hidden_size,
            bias=options.qkv_bias,
        )
        self._kv = self.qkv.from_channel(q_size // PART_MULTIPLE * PART_MULTIPLE)
        self.output: Projection = load_projection(
            weights, prefix, {"o_proj": config.hidden_size}, q_size, bias=options.output_bias
        )
        self._kv_scales = read_kv_scales(weights, prefix)
        self._norms: HeadNorms | None = None
        if options.qk_norm:
            self._norms = HeadNorms(
                q=weights.take(f"{prefix}.q_norm.weight", (config.head_dim,)),
                k=weights.take(f"{prefix}.k_norm.weight", (config.head_dim,)),
                eps=config.rms_norm_eps,
            )

    @property
    def kind(self) -> Hashable:
        """As that of projections."""
        return self.qkv.kind, self.output.kind, self._window, self._norms is not None

    def forward(
        self,
        hidden: ProjectionInput,
        residual: Tensor,
        cos_sin: Tensor,
        batch: AttentionBatch,
        kv_pool: Tensor,
    ) -> Tensor | None:
        """`hidden` [num_tokens, hidden_size], made by `qkv.normed`, to the same shape, or None if
        that is in the residual stream already; the new KV goes to the pool."""
        attended = self.attend(self.qkv.forward(hidden), cos_sin, batch, kv_pool)
        return self.output.onto(attended, residual)

    def attend(
        self, projected: Tensor, cos_sin: Tensor, batch: AttentionBatch, kv_pool: Tensor
    ) -> Tensor:
        """The part of `forward` between its products: what `qkv` makes, to
        [num_tokens, num_heads * head_dim]."""
        heads = projected.unflatten(-1, (-1, self._head_dim))
        q, k, v = heads.split([self._num_heads, self._num_kv_heads, self._num_kv_heads], dim=1)
        attended = rotate_and_attend(
            q,
            k,
            v,
            cos_sin,
            batch,
            kv_pool,
            self._layer,
            scale=self._scale,
            sliding_window=self._window,
            kv_scales=self._kv_scales,
            norms=self._norms,
        )
        return attended.flatten(1)

    def store_kv(
        self, hidden: ProjectionInput, cos_sin: Tensor, batch: AttentionBatch, kv_pool: Tensor
    ) -> None:
        """The part of `forward` that others attend to: no queries, no output."""
        product = self._kv if batch.num_tokens > _FEW_TOKENS else self.qkv
        size = 2 * self._num_kv_heads * self._head_dim
        heads = product.forward(hidden)[:, -size:].unflatten(-1, (-1, self._head_dim))
        k, v = heads.chunk(2, dim=1)
        rope_and_store_kv(
            heads[:, :0],  # no queries
            k,
            v,
            cos_sin,
            batch,
            kv_pool,
            self._layer,
            kv_scales=self._kv_scales,
            norms=self._norms,
        )


def read_kv_scales(weights: WeightSource, prefix: str) -> KVScales:
    """What calibration has left in the checkpoint for an attention layer, under any of the names in
    use; 1 where there is nothing."""
    return KVScales(k=_read_scale(weights, prefix, "k"), v=_read_scale(weights, prefix, "v"))


def _read_scale(weights: WeightSource, prefix: str, kind: str) -> float:
    for owner in ("", "attn.", f"{kind}_proj."):
        name = f"{prefix}.{owner}{kind}_scale"
        stored = weights.stored(name)
        if stored is not None:
            return float(weights.take(name, stored.shape, dtype=torch.float32))
    return 1.0
