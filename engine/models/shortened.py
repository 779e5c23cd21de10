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
    """The last of all, which does less for prompts than others, and before it the last of each two
    kinds that follow each other, since a layer may compute a part of the next; the first, unless
    the first of these is like it: it finds no output to add."""
    last = len(kinds) - 1
    some, seen = {last}, set[tuple[Hashable, Hashable]]()
    for layer in range(last - 1, -1, -1):
        pair = kinds[layer], kinds[layer + 1]
        if pair in seen:
            continue
        seen.add(pair)
        some.add(layer)
        if kinds[min(some - {layer})] != kinds[layer + 1]:
            some.add(layer + 1)
    if kinds[0] != kinds[min(some)]:
        some.add(0)
    return sorted(some)
