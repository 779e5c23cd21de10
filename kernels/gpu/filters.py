"""Top-k, top-p and min-p over rows of weights: a program finds a row's floor, and clears below."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.gpu.chunks import CHUNK, reduce_chunks
from kernels.gpu.dependent_launch import (
    launch_options,
    let_successor_start,
    wait_for_predecessor,
)
from kernels.gpu.floors import find_floor
from kernels.gpu.launching import launch
from kernels.gpu.sizes import next_power_of_2

_CHUNKS_AT_ONCE = tl.constexpr(16)


@triton.jit
def _filter_kernel(
    weights,
    width,
    top_k,
    top_p,
    min_p,
    maxima,
    sums,
    chunks,
    num_chunks,
    BLOCK: tl.constexpr,
    HAS_MIN_P: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_predecessor(PDL)
    let_successor_start(PDL)
    row = tl.program_id(0).to(tl.int64)
    weights += row * width
    maxima += row * num_chunks
    index = tl.arange(0, BLOCK)
    tops = tl.load(maxima + index, mask=index < num_chunks, other=0.0)
    total = tl.sum(tl.load(sums + row * num_chunks + index, mask=index < num_chunks, other=0.0))
    k = tl.load(top_k + row)
    p = tl.load(top_p + row)
    least = tl.load(min_p + row) if HAS_MIN_P else tl.full([], 0.0, tl.float32)
    chunks += row * num_chunks
    floor = find_floor(weights, width, chunks, tops, total, 1.0, 1.0, k, p, least, ARE_WEIGHTS=True)
    for start in range(0, num_chunks, _CHUNKS_AT_ONCE):
        chunk = start + tl.arange(0, _CHUNKS_AT_ONCE)
        columns = chunk[:, None] * CHUNK + tl.arange(0, CHUNK)[None, :]
        top = tl.load(maxima + chunk, mask=chunk < num_chunks, other=0.0)
        mask = columns < width
        x = tl.load(weights + columns, mask=mask & (top >= floor)[:, None], other=0.0)
        tl.store(weights + columns, 0.0, mask=mask & (x < floor))


def filter_weights(
    weights: Tensor, *, top_k: Tensor, top_p: Tensor, min_p: Tensor | None
) -> Tensor:
    """`kernels.sampling.filter_weights` in place, for contiguous `weights`."""
    num_rows, width = weights.shape
    if not num_rows:
        return weights
    maxima, sums = reduce_chunks(weights, temperature=None, are_weights=True)
    num_chunks = maxima.shape[1]
    launch(_filter_kernel, (num_rows,))(
        weights,
        width,
        top_k,
        top_p,
        min_p,
        maxima,
        sums,
        torch.empty_like(maxima, dtype=torch.int32),
        num_chunks,
        BLOCK=next_power_of_2(num_chunks),
        HAS_MIN_P=min_p is not None,
        num_warps=8,
        **launch_options(weights.device),
    )
    return weights
