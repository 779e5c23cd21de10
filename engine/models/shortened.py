"""A model with only those of its layers that others aren't like."""

import copy
from collections.abc import Hashable, Sequence

from engine.models.causal_lm import CausalLM


def shortened(model: CausalLM) -> CausalLM:
    """Launches all kernels that `model` does, in a part of the time; computes nothing of use."""
    few = copy.copy(model)
    few.layers = [model.layers[i] for i in unlike([layer.kind for layer in model.layers])]
    return few


def unlike(kinds: Sequence[Hashable]) -> list[int]:
    """The first of each kind, and the last of all, which does less for prompts than others."""
    firsts = {kinds.index(kind) for kind in kinds}
    return sorted(firsts | {len(kinds) - 1})
