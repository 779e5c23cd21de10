"""What kind of GPU a device is."""

import functools

import torch

_HOPPER = 9


@functools.cache
def is_hopper_card(device: torch.device) -> bool:
    """Neither older nor newer GPUs have this one's matrix instructions."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == _HOPPER
