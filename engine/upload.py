"""A step's arrays between host and device. Nothing here waits for work that is under way.

Copies from pageable memory would: so what goes to a GPU lies in pinned memory first.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_ALIGNMENT = 16
_FIRST_BYTES = 1 << 16


def to_device(array: NDArray[Any], device: torch.device) -> Tensor:
    """A copy of a small array. On a GPU, work queued from now on finds it."""
    tensor = torch.from_numpy(array.copy())
    # torch keeps the pinned memory until the copy has read it.
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def to_host(tensor: Tensor) -> Tensor:
    """A tensor on the CPU, filled when the work queued so far on its device is done."""
    if not tensor.is_cuda:
        return tensor
    pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return pinned.copy_(tensor, non_blocking=True)


class Uploader:
    """On a CPU the tensors share the arrays' memory. On a GPU all arrays of a step are packed into
    one pinned buffer and cross the bus together: at these sizes a copy costs its launch."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pinned = torch.empty(0, dtype=torch.uint8)
        self._copied: torch.cuda.Event | None = None

    def upload(self, arrays: Sequence[NDArray[Any]]) -> list[Tensor]:
        """The arrays as device tensors, valid until the next call; leave the arrays unchanged
        until then too."""
        if self._device.type == "cpu":
            return [torch.from_numpy(array) for array in arrays]
        offsets, num_bytes = _pack(arrays)
        self._await_buffer(num_bytes)
        staged = self._pinned.numpy()
        for array, offset in zip(arrays, offsets, strict=True):
            staged[offset : offset + array.nbytes] = array.reshape(-1).view(np.uint8)
        packed = self._pinned[:num_bytes].to(self._device, non_blocking=True)
        self._copied = torch.cuda.Event()
        self._copied.record()
        return [
            packed[offset : offset + array.nbytes]
            .view(torch.from_numpy(array).dtype)
            .view(array.shape)
            for array, offset in zip(arrays, offsets, strict=True)
        ]

    def _await_buffer(self, num_bytes: int) -> None:
        """A step without samples ends before the device has read the buffer."""
        if self._copied is not None:
            self._copied.synchronize()
        if num_bytes > self._pinned.numel():
            size = max(num_bytes, 2 * self._pinned.numel(), _FIRST_BYTES)
            self._pinned = torch.empty(size, dtype=torch.uint8, pin_memory=True)


def _pack(arrays: Sequence[NDArray[Any]]) -> tuple[list[int], int]:
    """Each array's offset in bytes, and the total."""
    offsets: list[int] = []
    end = 0
    for array in arrays:
        offsets.append(end)
        end += -(-array.nbytes // _ALIGNMENT) * _ALIGNMENT
    return offsets, end
