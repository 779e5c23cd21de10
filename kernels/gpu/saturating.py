"""Narrower types, in which what is too large becomes the largest number."""

# What kernels call is compiled with them, whatever types its decorator has.
# pyright: reportGeneralTypeIssues=false

import functools

import torch
import triton
import triton.language as tl
from triton import knobs

_LARGEST_FLOAT16 = tl.constexpr(65504.0)
_IS_INTERPRETED = tl.constexpr(knobs.runtime.interpret)
# From here on instructions that round to 8 bits do so.
_FIRST_CAPABILITY = (8, 9)


@triton.jit
def to_float16(x):
    """Of float32."""
    if _IS_INTERPRETED:
        x = tl.clamp(x, -_LARGEST_FLOAT16, _LARGEST_FLOAT16, propagate_nan=tl.PropagateNan.ALL)
        x = x.to(tl.float16)
    else:
        x = tl.inline_asm_elementwise(
            "cvt.rn.satfinite.f16x2.f32 $0, $2, $1;",
            "=r,f,f",
            [x],
            dtype=tl.float16,
            is_pure=True,
            pack=2,
        )
    return x


@triton.jit
def bounded(values, factor, largest, IS_FP8: tl.constexpr):
    """What an 8-bit pool stores for `values`, in float32, before it's rounded; `largest` is
    `bound_of` its type."""
    if IS_FP8:
        values = values.to(tl.float32) * factor
        if largest is not None:
            values = tl.clamp(values, -largest, largest, propagate_nan=tl.PropagateNan.ALL)
    return values


@functools.cache
def bound_of(dtype: torch.dtype, device: torch.device) -> float | None:
    """The largest number of an 8-bit type, or None where rounding sees to it."""
    rounds = device.type == "cuda" and not _IS_INTERPRETED.value
    if rounds and torch.cuda.get_device_capability(device) >= _FIRST_CAPABILITY:
        return None
    return torch.finfo(dtype).max
