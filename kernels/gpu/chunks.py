"""Rows as wide as a vocabulary, cut into chunks: what sampling's kernels share.

A first pass, by many programs, reduces every chunk to its largest value and a sum. The program
that then works on a row looks at those few, and reads only the chunks that matter.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.gpu.dependent_launch import (
    launch_options,
    let_successor_start,
    wait_for_predecessor,
)
from kernels.gpu.launching import launch
from kernels.gpu.sizes import ceil_div

CHUNK = tl.constexpr(256)
_CHUNKS_A_PROGRAM = 8


@triton.jit
def weights_of(scores, peak, temperature, ARE_WEIGHTS: tl.constexpr):
    """Weights of a row's `scores`, 1 for its largest, `peak`; or `scores` if they are weights."""
    return scores if ARE_WEIGHTS else tl.exp((scores - peak) / temperature)


@triton.jit
def list_chunks(chunks, tops, floor):
    """Writes to `chunks` which of `tops`, the largest weights of all chunks, are >= floor.

    Returns their number.
    """
    is_in = (tops >= floor).to(tl.int32)
    places = tl.cumsum(is_in) - 1
    tl.debug_barrier()  # the list before may still be read
    tl.store(chunks + places, tl.arange(0, tops.shape[0]), mask=is_in > 0)
    tl.debug_barrier()
    return tl.sum(is_in)


@triton.jit
def _reduce_kernel(
    scores,
    stride,
    width,
    temperature,
    maxima,
    sums,
    num_chunks,
    NUM: tl.constexpr,
    ARE_WEIGHTS: tl.constexpr,
    IS_GREEDY: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_predecessor(PDL)
    let_successor_start(PDL)
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1) * NUM + tl.arange(0, NUM)
    columns = chunk[:, None] * CHUNK + tl.arange(0, CHUNK)[None, :]
    outside = 0.0 if ARE_WEIGHTS else float("-inf")
    x = tl.load(scores + row * stride + columns, mask=columns < width, other=outside)
    x = x.to(tl.float32)
    top = tl.max(x, axis=1)
    out = row * num_chunks + chunk
    is_chunk = chunk < num_chunks
    tl.store(maxima + out, top, mask=is_chunk)
    if ARE_WEIGHTS:
        tl.store(sums + out, tl.sum(x.to(tl.float64), axis=1), mask=is_chunk)
    elif not IS_GREEDY:
        heat = tl.load(temperature + row)
        if heat > 0.0:
            base = tl.where(top == float("-inf"), 0.0, top)
            weights = weights_of(x, base[:, None], heat, ARE_WEIGHTS=False)
            tl.store(sums + out, tl.sum(weights, axis=1), mask=is_chunk)


def reduce_chunks(
    rows: Tensor, *, temperature: Tensor | None, are_weights: bool
) -> tuple[Tensor, Tensor]:
    """The chunks' largest values and sums, both [num_rows, num_chunks].

    Of scores, sums are float32 and of weights relative to the chunk's largest, where there's a
    temperature; of weights, they're float64 and as they are.
    """
    num_rows, width = rows.shape
    num_chunks = ceil_div(width, CHUNK.value)
    maxima = torch.empty((num_rows, num_chunks), device=rows.device)
    sums = torch.empty_like(maxima, dtype=torch.float64 if are_weights else torch.float32)
    launch(_reduce_kernel, (num_rows, ceil_div(num_chunks, _CHUNKS_A_PROGRAM)))(
        rows,
        rows.stride(0),
        width,
        temperature,
        maxima,
        sums,
        num_chunks,
        NUM=_CHUNKS_A_PROGRAM,
        ARE_WEIGHTS=are_weights,
        IS_GREEDY=temperature is None,
        num_warps=4,
        **launch_options(rows.device),
    )
    return maxima, sums
