"""Whether it pays that sequences jump over tokens which their grammars force.

Who jumps is spared the steps that would have chosen these tokens, and all of them take hardly more
of the one step that computes them: it reads the weights once. But a step with several tokens of a
sequence takes longer for everybody in it than a decode step that is a captured CUDA graph: a little
if it's captured, too (engine/prompt_graphs.py), a lot if it's launched kernel by kernel.
"""

from collections.abc import Sequence

# By so many steps' time, at most, does a captured step with chunks take longer than one without,
# and one that isn't captured. An 8B model in bfloat16 on an H100: 8.1 ms captured and 18.7 launched
# for 32 sequences and a chunk of 64 tokens, where 16 and 64 sequences alone take 6.7 and 9.3.
STEPS_LOST_TO_CHUNKS = 0.2
STEPS_LOST_WITHOUT_GRAPH = 2.0


def jumps_pay(
    nums_spared: Sequence[int], *, num_running: int, loses_graph: bool, max_captured: int
) -> bool:
    """Whether the sequences that would jump together, each spared some steps, gain more than the
    `num_running` that share their next step lose; `loses_graph` if that could be a graph of one
    token each, while a captured step has at most `max_captured` chunks."""
    is_captured = len(nums_spared) <= max_captured
    num_lost = STEPS_LOST_TO_CHUNKS if is_captured else STEPS_LOST_WITHOUT_GRAPH
    return sum(nums_spared) > (num_running * num_lost if loses_graph else 0)
