"""Where the programs of a layer's kernel meet: counters of arrivals, which some wait for.

All programs run at once, so whoever waits waits for programs that go on. What was stored before an
arrival is visible behind the wait, to loads that go past the L1 cache and, as both sides fence, to
the hardware that copies tiles.
"""

# Gluon's compiler gives these functions their types, not Python.
# pyright: reportCallIssue=false, reportAttributeAccessIssue=false, reportArgumentType=false
# pyright: reportGeneralTypeIssues=false

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

# Counters lie apart, in lines of their own.
COUNTER_STRIDE = gl.constexpr(32)
# What the counters count, in this order: rows of attention's output that are quantized; programs
# that have added their channels of it to the residual stream; rows that are normalised for the MLP;
# programs that have stored activations; that have added theirs of the MLP's output; rows that are
# normalised for the next layer.
ATTENDED = gl.constexpr(0)
ATTENTION_ADDED = gl.constexpr(1)
MLP_INPUT = gl.constexpr(2)
ACTIVATED = gl.constexpr(3)
MLP_ADDED = gl.constexpr(4)
NEXT_INPUT = gl.constexpr(5)
NUM_COUNTERS = gl.constexpr(6)


@gluon.jit
def _fence(value):
    """What is stored, or seen to be stored, comes before copies of tiles."""
    return gl.inline_asm_elementwise(
        "fence.proxy.async.global; mov.b32 $0, $1;",
        "=r,r", [value], dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def arrive(counters, which: gl.constexpr, IS_COPIED: gl.constexpr):
    """Once all threads' stores are made; they are fenced if tiles of them are copied."""
    if IS_COPIED:
        _fence(gl.program_id(0))
    tl.debug_barrier()
    gl.atomic_add(counters + which * COUNTER_STRIDE, 1, sem="release")


@gluon.jit
def _seen(counter):
    return gl.inline_asm_elementwise(
        "ld.acquire.gpu.global.b32 $0, [$1];",
        "=r,l", [counter.to(gl.int64)], dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def wait_for(counters, which: gl.constexpr, num, COPIES: gl.constexpr):
    counter = counters + which * COUNTER_STRIDE
    seen = _seen(counter)
    while seen < num:
        seen = _seen(counter)
    if COPIES:
        _fence(seen)


@gluon.jit
def reset(counters, which: gl.constexpr):
    gl.store(counters + which * COUNTER_STRIDE, 0)
