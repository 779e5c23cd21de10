"""Rows of a layer's kernel: quantized, normalised, and made of gates and what they are for."""

# Gluon's compiler gives these functions their types, not Python.
# pyright: reportCallIssue=false, reportAttributeAccessIssue=false, reportArgumentType=false
# pyright: reportAssignmentType=false
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from kernels.gpu.decode_attention import LOG2_E
from kernels.gpu.fp8 import LARGEST, SMALLEST_SCALE
from kernels.gpu.hopper.layer_loading import GATES, ROWS

# That multiply, and work on rows in between.
WARPS = gl.constexpr(4)


@gluon.jit
def _store_quantized(values, out, scales, row, size, columns):
    """A row of float32 numbers, 0 past its end, in 8 bits."""
    scale = gl.maximum(gl.max(gl.abs(values), 0) / LARGEST, SMALLEST_SCALE)
    quantized = (values * (1.0 / scale)).to(gl.float8e4nv)
    gl.store(out + row * size + columns, quantized, mask=columns < size)
    gl.store(scales + row, scale)


@gluon.jit
def quantize_row(x, row, size, out, scales, BLOCK: gl.constexpr):
    layout: gl.constexpr = gl.BlockedLayout([8], [32], [WARPS], [0])
    columns = gl.arange(0, BLOCK, layout=layout)
    values = gl.load(x + row * size + columns, mask=columns < size, other=0.0).to(gl.float32)
    _store_quantized(values, out, scales, row, size, columns)


@gluon.jit
def normalise_row(x, gain, eps, row, size, out, scales, BLOCK: gl.constexpr):
    """`gain` is the norm's weight, loaded beforehand."""
    layout: gl.constexpr = gl.BlockedLayout([8], [32], [WARPS], [0])
    columns = gl.arange(0, BLOCK, layout=layout)
    mask = columns < size
    at = x + row * size + columns
    values = gl.load(at, mask=mask, other=0.0, cache_modifier=".cg").to(gl.float32)
    scale = gl.rsqrt(gl.sum(values * values, 0) / size + eps)
    _store_quantized(values * scale * gain, out, scales, row, size, columns)


@gluon.jit
def activate(
    gates,
    up,
    activated,
    scales,
    num_tokens,
    intermediate_size,
    layout: gl.constexpr,
):
    """silu(gates) * up of a program's channels, a block with a scale for each token."""
    program = gl.program_id(0)
    rows = gl.arange(0, ROWS, layout=gl.SliceLayout(1, layout))
    columns = program * GATES + gl.arange(0, GATES, layout=gl.SliceLayout(0, layout))
    mask = rows < num_tokens
    values = gates / (1.0 + gl.exp2(-LOG2_E * gates)) * up
    scale = gl.maximum(gl.max(gl.abs(values), 1) / LARGEST, SMALLEST_SCALE)
    gl.store(scales + program * ROWS + rows, scale, mask=mask)
    quantized = (values * (1.0 / scale)[:, None]).to(gl.float8e4nv)
    at = activated + rows[:, None] * intermediate_size + columns[None, :]
    gl.store(at, quantized, mask=mask[:, None])
