"""Counters by which programs of one kernel find out who of them is the last."""

import functools

import torch
from torch import Tensor

_NUM_COUNTERS = 1 << 18


def arrival_counters(num: int, device: torch.device) -> Tensor:
    """At least `num` int32 counters, zero: who counts the last arrival sets its counter back.

    All kernels of a device share them, so at most one stream may run such kernels at a time; those
    of one stream take turns, since each waits for its predecessor's end before it counts. Their
    address never changes, as graphs hold it.
    """
    if num > _NUM_COUNTERS:
        raise ValueError(f"{num} counters of arrivals, where there are {_NUM_COUNTERS}")
    return _counters(device)


@functools.cache
def _counters(device: torch.device) -> Tensor:
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("a kernel whose programs count must run once before it's captured")
    return torch.zeros(_NUM_COUNTERS, dtype=torch.int32, device=device)
