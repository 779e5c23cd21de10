"""Capturing CUDA graphs into one memory."""

from collections.abc import Callable

import torch
from torch import Tensor


class GraphMemory:
    """Where graphs that never run at once have their tensors; the largest should come first."""

    def __init__(self) -> None:
        self.handle = torch.cuda.graph_pool_handle()


@torch.inference_mode()
def capture(
    forward: Callable[[], Tensor], memory: GraphMemory
) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    """The graph, and what `forward` returns: overwritten by a replay of any graph in `memory`.

    `forward` has run before, with the same shapes: kernels are compiled, and libraries have their
    workspaces.
    """
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=memory.handle):
        result = forward()
    return graph, result
