"""Whether it pays that sequences jump over tokens which their grammars force.

Who jumps is spared the steps that would have chosen these tokens, and all of them take hardly more
of the one step that computes them: it reads the weights once. But a step with several tokens of a
sequence can't be a captured CUDA graph, and being launched kernel by kernel it takes longer for
everybody in it.
"""

from collections.abc import Iterable

# By so many steps' time does a step without a graph take longer than a captured one.
STEPS_LOST_WITHOUT_GRAPH = 1.0


def jumps_pay(nums_spared: Iterable[int], *, num_running: int, loses_graph: bool) -> bool:
    """Whether the sequences that would jump together, each spared some steps, gain more than the
    `num_running` that share their next step lose; `loses_graph` if that could be a graph."""
    num_lost = num_running * STEPS_LOST_WITHOUT_GRAPH if loses_graph else 0
    return sum(nums_spared) > num_lost
