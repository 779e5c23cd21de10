"""Tokens from rows as wide as a vocabulary, each read once unless it's filtered.

A first kernel reduces every chunk of a row to its maximum and the sum of its weights relative to
that maximum; a second looks at the few chunk results of its row and at the one chunk that the
choice falls into. Shapes of programs depend on a row's width alone, so a row's result doesn't
depend on its neighbours, and nothing waits for the host.

The card's fast exponential makes weights differ from the reference's by some 1e-6 of themselves: a
random number that close to the border between two tokens may choose the other.
"""

# A scan does return.
# pyright: reportGeneralTypeIssues=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.choice import Filters
from kernels.gpu.chunks import CHUNK, list_chunks, reduce_chunks, weights_of
from kernels.gpu.dependent_launch import (
    launch_options,
    let_successor_start,
    wait_for_predecessor,
)
from kernels.gpu.floors import find_floor
from kernels.gpu.launching import launch
from kernels.gpu.sizes import next_power_of_2

_NUM_WARPS = 4
_NUM_WARPS_FILTERING = 8
_CHUNKS_AT_ONCE = tl.constexpr(16)


@triton.jit
def _choose_kernel(
    scores,
    stride,
    width,
    temperature,
    uniforms,
    top_k,
    top_p,
    min_p,
    maxima,
    sums,
    chunks,
    num_chunks,
    chosen,
    BLOCK: tl.constexpr,
    IS_GREEDY: tl.constexpr,
    IS_FILTERED: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_predecessor(PDL)
    let_successor_start(PDL)
    row = tl.program_id(0).to(tl.int64)
    scores += row * stride
    maxima += row * num_chunks
    index = tl.arange(0, BLOCK)
    tops = tl.load(maxima + index, mask=index < num_chunks, other=float("-inf"))
    if IS_GREEDY:
        token = _largest(scores, width, tops, num_chunks)
    else:
        heat = tl.load(temperature + row)
        if heat > 0.0:
            sums += row * num_chunks
            peak = tl.max(tops)
            peak = tl.where(peak == float("-inf"), 0.0, peak)
            tops = weights_of(tops, peak, heat, ARE_WEIGHTS=False)
            masses = tl.load(sums + index, mask=index < num_chunks, other=0.0)
            masses = masses.to(tl.float64) * tops
            floor = tl.full([], 0.0, tl.float32)
            if IS_FILTERED:
                k = tl.load(top_k + row)
                p = tl.load(top_p + row)
                least = tl.load(min_p + row)
                if (k > 0) | (p < 1.0) | (least > 0.0):
                    chunks += row * num_chunks
                    total = tl.sum(masses)
                    floor = find_floor(
                        scores,
                        width,
                        chunks,
                        tops,
                        total,
                        peak,
                        heat,
                        k,
                        p,
                        least,
                        ARE_WEIGHTS=False,
                    )
                    _sum_chunks(scores, width, chunks, tops, maxima, sums, peak, heat, floor)
                    masses = tl.load(sums + index, mask=tops >= floor, other=0.0)
                    masses = masses.to(tl.float64) * tops
            uniform = tl.load(uniforms + row)
            token = _draw_token(scores, width, masses, uniform, peak, heat, floor)
        else:
            token = _largest(scores, width, tops, num_chunks)
    tl.store(chosen + row, tl.minimum(token, width - 1).to(tl.int64))


@triton.jit
def _largest(scores, width, tops, num_chunks):
    """The first of the largest scores; `tops` are those of the chunks."""
    chunk = _first(tops == tl.max(tops), tl.arange(0, tops.shape[0]), num_chunks - 1)
    inner = tl.arange(0, CHUNK)
    columns = chunk * CHUNK + inner
    x = tl.load(scores + columns, mask=columns < width, other=float("-inf")).to(tl.float32)
    return chunk * CHUNK + _first(x == tl.max(x), inner, CHUNK - 1)


@triton.jit
def _draw_token(scores, width, masses, uniform, peak, temperature, floor):
    """A token chosen by `uniform` among those that reach the floor; `masses` are the chunks'."""
    chunk, share = _draw(masses, uniform)
    columns = chunk * CHUNK + tl.arange(0, CHUNK)
    x = tl.load(scores + columns, mask=columns < width, other=float("-inf")).to(tl.float32)
    weights = weights_of(x, peak, temperature, ARE_WEIGHTS=False)
    place, share = _draw(tl.where(weights >= floor, weights, 0.0).to(tl.float64), share)
    return chunk * CHUNK + place


@triton.jit
def _first(is_it, index, otherwise):
    """The first index where `is_it`."""
    return tl.min(tl.where(is_it, index, otherwise))


@triton.jit
def _draw(masses, uniform):
    """An index chosen by `uniform` in [0, 1), and where inside its mass that fell, in [0, 1).

    One without mass is never chosen, whatever the rounding, if any has mass.
    """
    index = tl.arange(0, masses.shape[0])
    ends = tl.cumsum(masses)
    target = uniform * tl.max(ends)
    last = tl.max(tl.where(masses > 0.0, index, 0))
    chosen = _first((ends > target) & (masses > 0.0), index, last)
    is_chosen = index == chosen
    mass = tl.sum(tl.where(is_chosen, masses, 0.0))
    start = tl.sum(tl.where(is_chosen, ends, 0.0)) - mass
    share = tl.where(mass > 0.0, (target - start) / mass, 0.0)
    return chosen, tl.minimum(tl.maximum(share, 0.0), 1.0)


@triton.jit
def _sum_chunks(scores, width, chunks, tops, maxima, sums, peak, temperature, floor):
    """Sums up, in place, what is left of the chunks that reach the floor."""
    num_listed = list_chunks(chunks, tops, floor)
    for start in range(0, num_listed, _CHUNKS_AT_ONCE):
        places = start + tl.arange(0, _CHUNKS_AT_ONCE)
        is_listed = places < num_listed
        chunk = tl.load(chunks + places, mask=is_listed, other=0)
        columns = chunk[:, None] * CHUNK + tl.arange(0, CHUNK)[None, :]
        mask = is_listed[:, None] & (columns < width)
        x = tl.load(scores + columns, mask=mask, other=float("-inf")).to(tl.float32)
        is_left = weights_of(x, peak, temperature, ARE_WEIGHTS=False) >= floor
        base = tl.load(maxima + chunk, mask=is_listed, other=0.0)
        weights = weights_of(x, base[:, None], temperature, ARE_WEIGHTS=False)
        left = tl.sum(tl.where(is_left, weights, 0.0), axis=1)
        tl.store(sums + chunk, left, mask=is_listed)
    tl.debug_barrier()


def choose_tokens(
    scores: Tensor,
    *,
    temperature: Tensor | None,
    uniforms: Tensor | None,
    filters: Filters | None,
) -> Tensor:
    """`kernels.choice.choose_tokens` for `scores` whose rows are contiguous."""
    num_rows, width = scores.shape
    chosen = torch.empty(num_rows, dtype=torch.int64, device=scores.device)
    if not num_rows:
        return chosen
    maxima, sums = reduce_chunks(scores, temperature=temperature, are_weights=False)
    num_chunks = maxima.shape[1]
    launch(_choose_kernel, (num_rows,))(
        scores,
        scores.stride(0),
        width,
        temperature,
        uniforms,
        None if filters is None else filters.top_k,
        None if filters is None else filters.top_p,
        None if filters is None else filters.min_p,
        maxima,
        sums,
        None if filters is None else torch.empty_like(maxima, dtype=torch.int32),
        num_chunks,
        chosen,
        BLOCK=next_power_of_2(num_chunks),
        IS_GREEDY=temperature is None,
        IS_FILTERED=filters is not None,
        num_warps=_NUM_WARPS if filters is None else _NUM_WARPS_FILTERING,
        **launch_options(scores.device),
    )
    return chosen
