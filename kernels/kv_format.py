"""Types of keys and values in the paged pool: that of the model, or one of 8 bits with scales."""

from dataclasses import dataclass

import torch
from torch import Tensor

FP8_DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2)
_NATIVE_FORMATS = {torch.float8_e4m3fn: 1, torch.float8_e5m2: 2}  # native/fp8.h


@dataclass(frozen=True, slots=True)
class KVScales:
    """What one layer's stored keys and values are multiplied with to give the true ones.

    They count for pools of 8 bits alone.
    """

    k: float = 1.0
    v: float = 1.0


UNSCALED = KVScales()


def scales_of(kv_pool: Tensor, scales: KVScales) -> KVScales:
    """The scales that count for this pool."""
    return scales if kv_pool.dtype in FP8_DTYPES else UNSCALED


def native_format(kv_pool: Tensor, dtype: torch.dtype) -> int | None:
    """What C kernels for tensors of `dtype` call the pool's type; None if they don't know it."""
    return 0 if kv_pool.dtype is dtype else _NATIVE_FORMATS.get(kv_pool.dtype)


def saturated(values: Tensor, dtype: torch.dtype) -> Tensor:
    """`values` in `dtype`, an FP8 type, where what is too large becomes the largest value."""
    largest = torch.finfo(dtype).max
    return values.clamp(-largest, largest).to(dtype)
