"""The gated feed-forward layer (SwiGLU, arXiv:2002.05202)."""

from torch import Tensor

from engine.models.config import ModelConfig
from engine.weights.source import WeightSource
from kernels.activation import silu_and_mul
from kernels.linear import linear, pack_linear


class GatedMLP:
    """`down(silu(gate(x)) * up(x))`, gate and up as one projection."""

    def __init__(
        self, config: ModelConfig, layer: int, weights: WeightSource, *, bias: bool = False
    ) -> None:
        prefix = f"model.layers.{layer}.mlp"
        hidden, intermediate = config.hidden_size, config.intermediate_size
        parts = (f"{prefix}.gate_proj", f"{prefix}.up_proj")
        self._gate_up = pack_linear(
            weights.take_stacked({f"{part}.weight": (intermediate, hidden) for part in parts}),
            weights.take_stacked({f"{part}.bias": (intermediate,) for part in parts})
            if bias
            else None,
        )
        self._down = pack_linear(
            weights.take(f"{prefix}.down_proj.weight", (hidden, intermediate)),
            weights.take(f"{prefix}.down_proj.bias", (hidden,)) if bias else None,
        )

    def forward(self, hidden: Tensor) -> Tensor:
        """`hidden` [num_tokens, hidden_size] to the same shape."""
        return linear(silu_and_mul(linear(hidden, self._gate_up)), self._down)
