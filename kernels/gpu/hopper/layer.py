"""All products of a decoder layer in one kernel, from attention's output to the next layer's qkv.

For the few tokens of a decode step a layer is the reading of its weights. As kernels of their own
its four products, and the norms and quantizations between them, leave the memory idle while one
ends and the next one begins; here a warp of each program asks for weights without a pause. The
programs, one on each multiprocessor, meet where a product needs all of the one before
(layer_meeting.py).
"""

# Gluon's compiler gives kernels their types, not Python.
# pyright: reportCallIssue=false, reportAssignmentType=false, reportGeneralTypeIssues=false

import functools

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from kernels.fp8 import FP8
from kernels.gpu.cards import num_multiprocessors
from kernels.gpu.dependent_launch import launch_options
from kernels.gpu.hopper.layer_loading import (
    GROUP,
    LINE,
    ROWS,
    STAGE_ROWS,
    load_tokens,
    load_weights,
)
from kernels.gpu.hopper.layer_meeting import COUNTER_STRIDE, NUM_COUNTERS
from kernels.gpu.hopper.layer_multiplying import multiply_layer
from kernels.gpu.hopper.layer_rows import WARPS
from kernels.gpu.hopper.layer_shapes import GATES, MAX_TOKENS, LayerTile
from kernels.gpu.hopper.linear_tiles import LOADING_REGISTERS
from kernels.gpu.launching import launch
from kernels.gpu.sizes import next_power_of_2
from kernels.layer import LayerWeights, NextWeights

# Of a thread at the start, before warps that load give up most of theirs. Half of a
# multiprocessor's are left to attention, beside which this kernel starts.
_REGISTERS = 128


@gluon.jit(
    do_not_specialize=[
        "num_tokens", "attended_size", "hidden_size", "intermediate_size", "next_size",
    ]
)  # fmt: skip
def _layer_kernel(
    output_desc,
    gates_desc,
    down_desc,
    next_desc,
    attended_desc,
    input_desc,
    activated_desc,
    attended,
    stream,
    mlp_norm,
    next_norm,
    attended_rows,
    attended_scales,
    rows,
    scales,
    activated,
    activated_scales,
    output_scales,
    gates_scales,
    down_scales,
    next_scales,
    out,
    counters,
    num_tokens,
    attended_size,
    hidden_size,
    intermediate_size,
    next_size,
    eps,
    BLOCK: gl.constexpr,
    NARROW: gl.constexpr,
    QKV: gl.constexpr,
    TOKENS: gl.constexpr,
    STAGES: gl.constexpr,
    ASKED: gl.constexpr,
    TOKEN_STAGES: gl.constexpr,
    LOADING_REGISTERS: gl.constexpr,
    HAS_NEXT: gl.constexpr,
    PDL: gl.constexpr,
):
    plain: gl.constexpr = mbarrier.MBarrierLayout()
    tiles = gl.allocate_shared_memory(
        output_desc.dtype, [STAGES, STAGE_ROWS, LINE], output_desc.layout
    )
    # A tile is multiplied with those behind it, up to `ROWS`, whose products nobody looks at.
    token_tiles = gl.allocate_shared_memory(
        output_desc.dtype,
        [TOKEN_STAGES * GROUP + ROWS // TOKENS - 1, TOKENS, LINE],
        output_desc.layout,
    )
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], plain)
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], plain)
    tokens_full = gl.allocate_shared_memory(gl.int64, [TOKEN_STAGES, 1], plain)
    tokens_empty = gl.allocate_shared_memory(gl.int64, [TOKEN_STAGES, 1], plain)
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=1)
    for stage in gl.static_range(TOKEN_STAGES):
        mbarrier.init(tokens_full.index(stage), count=1)
        mbarrier.init(tokens_empty.index(stage), count=1)
    sizes = (num_tokens, attended_size, hidden_size, intermediate_size, next_size, eps)
    tensors = (
        attended, stream, (mlp_norm, next_norm),
        (attended_rows, attended_scales, rows, scales, activated, activated_scales),
        (output_scales, gates_scales, down_scales, next_scales), out,
    )  # fmt: skip
    gl.warp_specialize(
        [
            (
                multiply_layer,
                (
                    tensors, (token_tiles, tiles), (full, empty, tokens_full, tokens_empty),
                    counters, sizes, BLOCK, NARROW, QKV, STAGES, TOKEN_STAGES,
                    HAS_NEXT, PDL,
                ),
            ),
            (
                load_weights,
                (
                    (output_desc, gates_desc, down_desc, next_desc), tiles, (full, empty), sizes,
                    NARROW, QKV, STAGES, ASKED, HAS_NEXT,
                ),
            ),
            (
                load_tokens,
                (
                    (attended_desc, input_desc, activated_desc), token_tiles,
                    (tokens_full, tokens_empty), counters, sizes, NARROW, QKV, TOKENS,
                    TOKEN_STAGES, HAS_NEXT, PDL,
                ),
            ),
        ],
        [1, 1],
        [LOADING_REGISTERS, LOADING_REGISTERS],
    )  # fmt: skip


def layer_products(
    attended: Tensor,
    stream: Tensor,
    weights: LayerWeights,
    following: NextWeights | None,
    eps: float,
    *,
    tile: LayerTile,
) -> Tensor | None:
    """`kernels.layer.joined_products`."""
    num_tokens, attended_size = attended.shape
    hidden_size, intermediate_size = weights.down.values.shape
    device = stream.device
    attended_rows, rows, activated = (
        torch.empty((num_tokens, size), dtype=FP8, device=device)
        for size in (attended_size, hidden_size, intermediate_size)
    )
    token_scales = torch.empty((2, MAX_TOKENS), dtype=torch.float32, device=device)
    block_scales = torch.empty(
        (intermediate_size // GATES, MAX_TOKENS), dtype=torch.float32, device=device
    )
    # Something of the right type where nothing follows.
    out, next_norm, next_qkv = stream, weights.norm, weights.output
    if following is not None:
        next_norm, next_qkv = following.norm, following.qkv
        shape = (num_tokens, len(next_qkv.values))
        out = torch.empty(shape, dtype=stream.dtype, device=device)
    launch(_layer_kernel, (num_multiprocessors(device),))(
        _descriptor(weights.output.values, tile.narrow),
        _descriptor(weights.gate_up.values, GATES),
        _descriptor(weights.down.values, tile.narrow),
        _descriptor(next_qkv.values, tile.qkv),
        _descriptor(attended_rows, tile.tokens),
        _descriptor(rows, tile.tokens),
        _descriptor(activated, tile.tokens),
        attended,
        stream,
        weights.norm,
        next_norm,
        attended_rows,
        token_scales[0],
        rows,
        token_scales[1],
        activated,
        block_scales,
        weights.output.scales,
        weights.gate_up.scales,
        weights.down.scales,
        next_qkv.scales,
        out,
        _counters(device),
        num_tokens,
        attended_size,
        hidden_size,
        intermediate_size,
        len(next_qkv.values),
        eps,
        BLOCK=next_power_of_2(max(attended_size, hidden_size)),
        NARROW=tile.narrow,
        QKV=tile.qkv,
        TOKENS=tile.tokens,
        STAGES=tile.stages,
        ASKED=tile.asked,
        TOKEN_STAGES=tile.token_stages,
        LOADING_REGISTERS=LOADING_REGISTERS,
        HAS_NEXT=following is not None,
        num_warps=WARPS.value,
        maxnreg=_REGISTERS,
        **launch_options(device),
    )
    return out if following is not None else None


def _descriptor(values: Tensor, rows: int) -> TensorDescriptor:
    return TensorDescriptor(
        values,
        shape=list(values.shape),
        strides=[values.stride(0), 1],
        block_shape=[rows, LINE.value],
        layout=gl.NVMMASharedLayout(128, 8, 2),
    )


@functools.cache
def _counters(device: torch.device) -> Tensor:
    """Zero between calls, but for some that the next call sets back: kernels on one stream take
    turns with them."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("a kernel whose programs meet must run once before it's captured")
    size = NUM_COUNTERS.value * COUNTER_STRIDE.value
    return torch.zeros(size, dtype=torch.int32, device=device)
