"""The layer that encoders stack: attention over the whole text, then an MLP, each with its norm
behind the addition to what came in (arXiv:1706.03762)."""

import torch
from torch import Tensor
from torch.nn import functional as F

from engine.layers.projection import Projection, load_projection
from engine.models.encoder_config import Activation, EncoderConfig
from engine.text_batch import Rectangle, TextBatch
from engine.weights.source import WeightSource


class LayerNorm:
    """Mean and variance of each token's vector, with weight and bias."""

    def __init__(self, weights: WeightSource, prefix: str, size: int, eps: float) -> None:
        self._shape = (size,)
        self._weight = weights.take(f"{prefix}.weight", self._shape)
        self._bias = weights.take(f"{prefix}.bias", self._shape)
        self._eps = eps

    def forward(self, hidden: Tensor) -> Tensor:
        return F.layer_norm(hidden, self._shape, self._weight, self._bias, self._eps)


class EncoderLayer:
    """Every token attends to all tokens of its text."""

    def __init__(self, config: EncoderConfig, weights: WeightSource, prefix: str) -> None:
        size, eps = config.hidden_size, config.layer_norm_eps
        self._head_dim = config.head_dim
        self._activation: Activation = config.activation
        self._qkv: Projection = load_projection(
            weights,
            f"{prefix}.attention.self",
            {"query": size, "key": size, "value": size},
            size,
            bias=True,
        )
        self._output = load_projection(
            weights, f"{prefix}.attention.output", {"dense": size}, size, bias=True
        )
        self._attention_norm = LayerNorm(weights, f"{prefix}.attention.output.LayerNorm", size, eps)
        self._up = load_projection(
            weights, f"{prefix}.intermediate", {"dense": config.intermediate_size}, size, bias=True
        )
        self._down = load_projection(
            weights, f"{prefix}.output", {"dense": size}, config.intermediate_size, bias=True
        )
        self._mlp_norm = LayerNorm(weights, f"{prefix}.output.LayerNorm", size, eps)

    def forward(self, hidden: Tensor, batch: TextBatch) -> Tensor:
        """[num_tokens, hidden_size] to the same shape."""
        heads = self._qkv.forward(hidden).unflatten(-1, (3, -1, self._head_dim))
        attended = torch.cat([_attend(heads, rectangle) for rectangle in batch.rectangles])
        hidden = self._attention_norm.forward(hidden + self._output.forward(attended))
        inner = _activate(self._up.forward(hidden), self._activation)
        return self._mlp_norm.forward(hidden + self._down.forward(inner))


def _attend(heads: Tensor, rectangle: Rectangle) -> Tensor:
    """`heads` [num_tokens, 3, num_heads, head_dim], of the whole batch, to the rectangle's tokens'
    [num_tokens, hidden_size]."""
    ours = heads[rectangle.first : rectangle.end]
    if rectangle.places is not None:
        padded = ours.new_zeros((rectangle.num_texts * rectangle.num_columns, *ours.shape[1:]))
        ours = padded.index_copy_(0, rectangle.places, ours)
    # Each is num_texts by num_heads by num_columns by head_dim.
    q, k, v = ours.unflatten(0, (rectangle.num_texts, -1)).permute(2, 0, 3, 1, 4)
    attended = F.scaled_dot_product_attention(q, k, v, attn_mask=rectangle.mask)
    rows = attended.transpose(1, 2).flatten(2).flatten(0, 1)
    return rows if rectangle.places is None else rows.index_select(0, rectangle.places)


def _activate(x: Tensor, activation: Activation) -> Tensor:
    match activation:
        case "gelu":
            return F.gelu(x)
        case "gelu_tanh":
            return F.gelu(x, approximate="tanh")
        case "relu":
            return F.relu(x)
