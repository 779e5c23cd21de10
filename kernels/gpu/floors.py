"""The floor that top-k, top-p and min-p put under a row's weights, found by one program.

Non-negative floats order as their bits do. So the floor is looked for among bits: eight candidates
at a time split the interval that it's in, and one pass over the row counts the weights above each,
or sums them up in float64. It ends when one weight is left in the interval, after one to four
passes over a language model's row; where equal weights lie at the floor, as bfloat16 logits make
them, it takes up to ten. The row comes in chunks with known maxima, and a pass reads only chunks
that reach into the interval: mostly few.

Sums come in another order than the reference's. So top-p may keep one weight more or less where its
share of the total falls on a partial sum to within float64's rounding.
"""

import triton
import triton.language as tl

from kernels.gpu.chunks import CHUNK, list_chunks, weights_of

_CANDIDATES = tl.constexpr(8)
# A pass takes 4 x 4 chunks at a time; sums over the first four stay inside threads.
_ROUNDS = tl.constexpr(4)
_CHUNKS_A_ROUND = tl.constexpr(4)
_CHUNKS_AT_ONCE = tl.constexpr(16)


@triton.jit
def find_floor(
    row,
    width,
    chunks,
    tops,
    total,
    peak,
    temperature,
    top_k,
    top_p,
    min_p,
    ARE_WEIGHTS: tl.constexpr,
):
    """A floor > 0 such that the weights >= it are those that the filters leave.

    `row` points to scores or weights, `chunks` to room for a list of chunks; `tops` are the
    largest weights of all chunks, `total` is the sum of all weights.
    """
    top = tl.max(tops).to(tl.int32, bitcast=True)
    floor = tl.maximum(min_p.to(tl.int32, bitcast=True), 1)
    excess = 0.0
    excess = excess.to(tl.float64)
    if top_k > 0:
        wanted = top_k.to(tl.float64)
        floor = tl.maximum(floor, _bound(tops, top, wanted, BY_MASS=False))
        floor, reached = _narrow(
            row,
            width,
            chunks,
            tops,
            peak,
            temperature,
            floor,
            top + 1,
            wanted,
            BY_MASS=False,
            ARE_WEIGHTS=ARE_WEIGHTS,
        )
        # Equals of the k-th weight stay, but top-p sees the first k alone.
        excess = tl.maximum(reached - wanted, 0.0)
    if top_p < 1.0:
        value = floor.to(tl.float32, bitcast=True)
        if (top_k > 0) | (min_p > 0.0):
            num_listed = list_chunks(chunks, tops, value)
            floors = tl.zeros([1], tl.float32) + value
            above = _above(
                row,
                width,
                chunks,
                num_listed,
                peak,
                temperature,
                floors,
                BY_MASS=True,
                ARE_WEIGHTS=ARE_WEIGHTS,
            )
            total = tl.sum(above) - excess * value
        wanted = top_p.to(tl.float64) * total
        # All weights below this together are less than what top-p leaves out.
        least = (0.999 * (total - wanted) / width).to(tl.float32).to(tl.int32, bitcast=True)
        floor = tl.maximum(floor, tl.maximum(least, _bound(tops, top, wanted, BY_MASS=True)))
        floor, reached = _narrow(
            row,
            width,
            chunks,
            tops,
            peak,
            temperature,
            floor,
            top + 1,
            wanted,
            BY_MASS=True,
            ARE_WEIGHTS=ARE_WEIGHTS,
        )
    return floor.to(tl.float32, bitcast=True)


@triton.jit
def _bound(tops, top, wanted, BY_MASS: tl.constexpr):
    """Bits of a floor that's not too high: of `tops` alone there are `wanted` above it."""
    low = tl.zeros_like(top)
    high = top + 1
    for _ in range(16):
        middle = (low + high) // 2
        is_above = tops >= middle.to(tl.float32, bitcast=True)
        found = tl.sum(tl.where(is_above, tops if BY_MASS else 1.0, 0.0).to(tl.float64))
        low = tl.where(found >= wanted, middle, low)
        high = tl.where(found >= wanted, high, middle)
    return low


@triton.jit
def _narrow(
    row,
    width,
    chunks,
    tops,
    peak,
    temperature,
    low,
    high,
    wanted,
    BY_MASS: tl.constexpr,
    ARE_WEIGHTS: tl.constexpr,
):
    """The floor's bits and how many weights are >= it (or their sum, `BY_MASS`).

    It's the highest in [low, high) with at least `wanted`, up to a gap without weights; `low` if
    there is none.
    """
    above_low = tl.full([], 0.0, tl.float64)
    above_high = tl.full([], 0.0, tl.float64)
    is_open = high > low
    while is_open:
        num_listed = list_chunks(chunks, tops, low.to(tl.float32, bitcast=True))
        steps = (high - low).to(tl.int64) * tl.arange(0, _CANDIDATES) // _CANDIDATES
        candidates = low + steps.to(tl.int32)
        floors = candidates.to(tl.float32, bitcast=True)
        above = _above(
            row, width, chunks, num_listed, peak, temperature, floors, BY_MASS, ARE_WEIGHTS
        )
        is_reached = above >= wanted
        low = tl.max(tl.where(is_reached, candidates, low))
        high = tl.min(tl.where(is_reached, high, candidates))
        above_low = tl.min(tl.where(is_reached, above, tl.max(above)))
        above_high = tl.max(tl.where(is_reached, above_high, above))
        if BY_MASS:
            has_several = above_low - above_high > 1.5 * low.to(tl.float32, bitcast=True)
        else:
            has_several = above_low > wanted
        is_open = (high - low > 1) & has_several
    return low, above_low


@triton.jit
def _above(
    row,
    width,
    chunks,
    num_listed,
    peak,
    temperature,
    floors,
    BY_MASS: tl.constexpr,
    ARE_WEIGHTS: tl.constexpr,
):
    """How many weights of the listed chunks are >= each of `floors`, or what they sum up to."""
    outside = 0.0 if ARE_WEIGHTS else float("-inf")
    places = tl.arange(0, _ROUNDS)[:, None] * _CHUNKS_A_ROUND + tl.arange(0, _CHUNKS_A_ROUND)[None]
    sums = tl.zeros([floors.shape[0], _CHUNKS_A_ROUND, CHUNK], tl.float64 if BY_MASS else tl.int32)
    for start in range(0, num_listed, _CHUNKS_AT_ONCE):
        is_listed = start + places < num_listed
        chunk = tl.load(chunks + start + places, mask=is_listed, other=0)
        columns = chunk[:, :, None] * CHUNK + tl.arange(0, CHUNK)[None, None, :]
        mask = is_listed[:, :, None] & (columns < width)
        scores = tl.load(row + columns, mask=mask, other=outside).to(tl.float32)
        weights = weights_of(scores, peak, temperature, ARE_WEIGHTS)[None, :, :, :]
        is_above = weights >= floors[:, None, None, None]
        if BY_MASS:
            sums += tl.sum(tl.where(is_above, weights.to(tl.float64), 0.0), axis=1)
        else:
            sums += tl.sum(is_above.to(tl.int32), axis=1)
    return tl.sum(tl.sum(sums, axis=2), axis=1).to(tl.float64)
