"""How much of a GPU each worker of a stack may use."""

import math


def gpu_memory_share(utilization: float, num_workers: int) -> float:
    """Each one's share if `num_workers` workers use `utilization` of one card together.

    All workers of a machine run on its first card. The setting is for one worker, so a share that
    the operator has named stays as it is.
    """
    # Rounded down, so that all of them together never have more.
    return math.floor(utilization / num_workers * 1000) / 1000
