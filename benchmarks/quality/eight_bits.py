"""Which of attention's numbers cost how much when they have 8 bits (e4m3), with the built-in model.

    python -m benchmarks.quality.eight_bits [--tokens 32768] [--variants NAME ...] [--out FILE.json]

Perplexity of the text that `fp8_perplexity` reads. Attention runs in torch, in 16 bits but for what
a variant rounds, each number to the nearest with a scale of 1:

- "keys", "values" and both, which is an fp8 cache;
- with those also queries, and the weights that values are summed with: what FlashAttention 3 does
  (weights of up to 256, their sum unrounded);
- keys less their mean over another text, for each head and channel, which no weight depends on;
- keys turned by a Hadamard matrix, and queries as well, so that no channel is much larger: whole
  heads, or each half of a head on its own, which is what `kernels.turning` does for an fp8 cache,
  or just the pairs that RoPE rotates.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks.quality.fp8_perplexity import WINDOW, perplexity, read_windows
from benchmarks.quality.rows import add_row, read_arguments, wanted, write_rows
from engine.models.config import read_model_config
from engine.models.registry import load_model
from engine.tokenizer import Tokenizer
from engine.weights.model_dir import resolve_model
from kernels.attention import AttentionBatch
from kernels.fp8 import FP8, FP8_MAX
from kernels.rope import rope_and_store_kv
from kernels.turning import turned

CALIBRATION_WINDOWS = 2
LARGEST_WEIGHT = 256.0


def pairs_turned(x: Tensor) -> Tensor:
    """The two elements that RoPE rotates, each."""
    first, second = x.chunk(2, -1)
    return torch.cat((first + second, first - second), -1) * 2**-0.5


def wholly_turned(x: Tensor) -> Tensor:
    return pairs_turned(turned(x))


@dataclass(frozen=True, slots=True)
class Variant:
    """What has 8 bits, and what is done to keys before."""

    name: str
    keys: bool = False
    values: bool = False
    queries: bool = False
    weights: bool = False
    is_centred: bool = False
    turn: Callable[[Tensor], Tensor] | None = None


VARIANTS = (
    Variant("16 bits"),
    Variant("keys", keys=True),
    Variant("values", values=True),
    Variant("keys and values", keys=True, values=True),
    Variant("keys, values and queries", keys=True, values=True, queries=True),
    Variant(
        "keys, values, queries and weights", keys=True, values=True, queries=True, weights=True
    ),
    Variant("keys less their mean", keys=True, is_centred=True),
    Variant("keys less their mean, and values", keys=True, values=True, is_centred=True),
    Variant("keys, pairs turned", keys=True, turn=pairs_turned),
    Variant("keys, heads turned", keys=True, turn=wholly_turned),
    Variant("keys, halves turned", keys=True, turn=turned),
    Variant("keys, halves turned, and values", keys=True, values=True, turn=turned),
    Variant(
        "keys, halves turned, values and queries", keys=True, values=True, queries=True, turn=turned
    ),
    Variant(
        "keys, halves turned, values, queries and weights",
        keys=True,
        values=True,
        queries=True,
        weights=True,
        turn=turned,
    ),
)


def rounded(x: Tensor) -> Tensor:
    return x.clamp(-FP8_MAX, FP8_MAX).to(FP8).float()


class Attention:
    """Stands in for `rotate_and_attend`, where a step is one whole sequence."""

    def __init__(self) -> None:
        self.variant = VARIANTS[0]
        self.sums: dict[int, Any] | None = None
        """Of windows' mean keys by layer, while they are added up."""
        self.means: dict[int, Tensor] = {}

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cos_sin: Tensor,
        batch: AttentionBatch,
        kv_pool: Tensor,
        layer: int,
        *,
        scale: float,
        **_: object,
    ) -> Tensor:
        assert batch.num_seqs == 1
        assert batch.max_query_len == batch.max_kv_len == len(q)
        rope_and_store_kv(q, k, v, cos_sin, batch, kv_pool, layer)
        # To [tokens, heads, head_dim], of blocks in order.
        keys, values = kv_pool[:, layer].permute(1, 0, 3, 2, 4).flatten(1, 2)[:, : len(q)].float()
        if self.sums is not None:
            self.sums[layer] = self.sums.get(layer, 0) + keys.mean(0)
        of, queries = self.variant, q.float()
        if of.is_centred:
            keys = keys - self.means[layer]
        if of.turn is not None:
            keys, queries = of.turn(keys), of.turn(queries)
        keys = rounded(keys) if of.keys else keys
        values = rounded(values) if of.values else values
        queries = rounded(queries) if of.queries else queries
        group = q.shape[1] // keys.shape[1]
        keys, values = (x.repeat_interleave(group, 1) for x in (keys, values))
        return self._attend(queries, keys, values, scale).to(q.dtype)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """All are [num_tokens, num_heads, head_dim]."""
        scores = torch.einsum("qhd,khd->hqk", q, k) * scale
        hidden = torch.ones(len(q), len(q), dtype=torch.bool).triu(1)
        scores.masked_fill_(hidden, -torch.inf)
        weights = LARGEST_WEIGHT * (scores - scores.amax(-1, keepdim=True)).exp()
        total = weights.sum(-1, keepdim=True)
        if self.variant.weights:
            weights = rounded(weights)
        return torch.einsum("hqk,khd->qhd", weights / total, v)


def main() -> None:
    args = read_arguments(__doc__, VARIANTS, num_tokens=32768)
    attention = Attention()
    rows: list[dict[str, Any]] = []
    model_dir = resolve_model(None)
    model = load_model(
        read_model_config(model_dir), model_dir, dtype=torch.bfloat16, device=torch.device("cpu")
    )
    num_tokens = args.tokens + CALIBRATION_WINDOWS * WINDOW
    windows = list(read_windows(Tokenizer.from_dir(model_dir), num_tokens))
    windows, others = windows[:-CALIBRATION_WINDOWS], windows[-CALIBRATION_WINDOWS:]
    with mock.patch("engine.layers.attention.rotate_and_attend", attention):
        attention.sums = {}
        perplexity(model, others)
        attention.means = {layer: x / len(others) for layer, x in attention.sums.items()}
        attention.sums = None
        for attention.variant in wanted(VARIANTS, args.variants):
            found = perplexity(model, windows)
            add_row(rows, "of_8_bits", attention.variant.name, found)
    write_rows(args.out, rows, len(windows) * (WINDOW - 1))


if __name__ == "__main__":
    main()
