"""The gated feed-forward layer (SwiGLU, arXiv:2002.05202)."""

from collections.abc import Hashable

from torch import Tensor

from engine.layers.projection import Projection, ProjectionInput, load_projection
from engine.models.config import ModelConfig
from engine.weights.source import WeightSource


class GatedMLP:
    """`down(silu(gate(x)) * up(x))`, gate and up as one projection."""

    def __init__(
        self, config: ModelConfig, layer: int, weights: WeightSource, *, bias: bool = False
    ) -> None:
        prefix = f"model.layers.{layer}.mlp"
        hidden, intermediate = config.hidden_size, config.intermediate_size
        self.gate_up: Projection = load_projection(
            weights,
            prefix,
            {"gate_proj": intermediate, "up_proj": intermediate},
            hidden,
            bias=bias,
        )
        self.down: Projection = load_projection(
            weights, prefix, {"down_proj": hidden}, intermediate, bias=bias
        )

    @property
    def kind(self) -> Hashable:
        """As that of projections."""
        return self.gate_up.kind, self.down.kind

    def forward(self, hidden: ProjectionInput, residual: Tensor) -> Tensor | None:
        """`hidden` [num_tokens, hidden_size], made by `gate_up.normed`, to the same shape, or None
        if that is in the residual stream already."""
        return self.down.onto(self.gate_up.forward_gated(hidden, then=self.down), residual)
