"""Times calls by the device's clock, from CUDA graphs, in which launches cost nothing."""

from collections.abc import Callable, Sequence

import torch

Call = Callable[[], object]


def captured(calls: Sequence[Call]) -> torch.cuda.CUDAGraph:
    """A graph of all `calls`, replayed once."""
    # Inputs may still be under way on another stream.
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for call in calls[:2]:
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    return graph


def replay_s(graph: torch.cuda.CUDAGraph, num_replays: int = 1) -> float:
    """Seconds a replay, of some back to back."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(num_replays):
        graph.replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / num_replays


def time_s(calls: Sequence[Call], repeats: int = 5) -> float:
    """Seconds a call, over all of `calls` in one graph; the least of some replays."""
    graph = captured(calls)
    return min(replay_s(graph) for _ in range(repeats)) / len(calls)


def sustained_s(calls: Sequence[Call], duration_s: float = 1.0) -> float:
    """Seconds a call, over replays for as long as `duration_s` behind a quarter of that: clocks are
    those that the card's power allows."""
    graph = captured(calls)
    num_replays = max(1, round(duration_s / replay_s(graph)))
    replay_s(graph, -(-num_replays // 4))
    return replay_s(graph, num_replays) / len(calls)
