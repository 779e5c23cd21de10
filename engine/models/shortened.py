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
    """The first of each kind; the last of all, which does less for prompts than others; and unless
    that is like the first of all, another that is: it may find an output to add."""
    some = {kinds.index(kind) for kind in kinds} | {len(kinds) - 1}
    if kinds[-1] != kinds[0] and kinds[0] in kinds[1:]:
        some.add(kinds.index(kinds[0], 1))
    return sorted(some)
