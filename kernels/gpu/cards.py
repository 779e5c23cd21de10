"""What kind of GPU a device is."""

import functools
import os
from pathlib import Path

import torch

_HOPPER = 9
_FAST_BYTES_PER_S = 4.5e12
_MPS_VARIABLE, _MPS_DIRECTORY = "CUDA_MPS_PIPE_DIRECTORY", Path("/tmp/nvidia-mps")  # noqa: S108


@functools.cache
def is_hopper_card(device: torch.device) -> bool:
    """Neither older nor newer GPUs have this one's matrix instructions."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == _HOPPER


@functools.cache
def num_multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def has_fast_memory(device: torch.device) -> bool:
    """Whether the memory's clock and bus would give 4.5 TB/s: an H200's give 4.8, an H100's 3.35.
    The faster a card reads, the more of a product's time is what its programs do beside that."""
    if device.type != "cuda":
        return False
    properties = torch.cuda.get_device_properties(device)
    transfers_per_s = 2 * 1e3 * properties.memory_clock_rate
    return transfers_per_s * properties.memory_bus_width / 8 > _FAST_BYTES_PER_S


@functools.cache
def shares_multiprocessors() -> bool:
    """Whether other processes' kernels may run beside this one's at once, by NVIDIA's
    Multi-Process Service: a kernel then can't tell how many of its programs do."""
    return _MPS_VARIABLE in os.environ or _MPS_DIRECTORY.exists()
