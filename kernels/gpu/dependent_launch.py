"""Programmatic dependent launch: a kernel starts while the one before it on the stream ends.

On Hopper and later a kernel may be set up, and its programs placed, before its predecessor is
through. Every kernel here calls `wait_for_predecessor`, which returns when all that the
predecessor wrote is visible, and only then `let_successor_start`. So a kernel that has started
knows all kernels but the one before it to have ended. Before it waits it may read what that one
can't have written, weights and a step's geometry, and ask for memory to come nearer; it writes
nothing. Between the hundreds of short kernels of a decode step this hides the launches.
"""

import functools
from typing import Any

import torch
import triton
import triton.language as tl

_HOPPER = 9
LINE_BITS = tl.constexpr(8 * 128)


@triton.jit
def wait_for_predecessor(PDL: tl.constexpr) -> None:
    if PDL:
        tl.extra.cuda.gdc_wait()  # pyright: ignore[reportAttributeAccessIssue]


@triton.jit
def let_successor_start(PDL: tl.constexpr) -> None:
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()  # pyright: ignore[reportAttributeAccessIssue]


@triton.jit
def prefetch_to_l2(pointers) -> None:
    """Asks for the 128-byte lines that `pointers` lie in, and waits for nothing."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;",
        "=r,l",
        [pointers.to(tl.int64)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@functools.cache
def launch_options(device: torch.device) -> dict[str, Any]:
    """Arguments of every launch on `device`: the kernel's `PDL`, and the launcher's own."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= _HOPPER:
        return {"PDL": True, "launch_pdl": True}
    return {"PDL": False}
