"""Tokens from scores: the largest, or one chosen by a random number after top-k, top-p and min-p.

A row is cut into chunks of `CHUNK` values. One vectorised pass reduces each chunk; the search
itself then looks at the few chunk results and at one chunk. On a CPU that's an order of magnitude
faster than `argmax` or `cumsum` over the row, and sums of float32 stay short enough to be exact
to their last bits. Rows never mix, so a row's result doesn't depend on its neighbours.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.sampling import filter_weights

CHUNK = 256
_BELOW_ONE = 1.0 - 2.0**-53


@dataclass(frozen=True, slots=True, eq=False)
class Filters:
    """One of each for a row; `kernels.sampling.filter_weights` says what they mean.

    `top_k` int64, 0 for none; `top_p` float32, 1 for none; `min_p` float32, 0 for none: all [n].
    """

    top_k: Tensor
    top_p: Tensor
    min_p: Tensor

    def of(self, rows: Tensor) -> "Filters":
        return Filters(self.top_k[rows], self.top_p[rows], self.min_p[rows])


def choose_tokens(
    scores: Tensor,
    *,
    temperature: Tensor | None = None,
    uniforms: Tensor | None = None,
    filters: Filters | None = None,
) -> Tensor:
    """One index a row of `scores` [num_rows, width], floats of any kind: int64 [num_rows].

    A row whose `temperature` (float32 [num_rows]) is 0 takes the first of its largest scores, as
    all do without `temperature`. The others choose i with a probability in proportion to
    exp(scores[i] / temperature) by `uniforms` (float64 [num_rows], in [0, 1)), among what the
    filters leave. `scores` may be overwritten. On a GPU nothing here waits for the device.
    """
    if (temperature is None) != (uniforms is None) or (filters and temperature is None):
        raise ValueError("rows with a temperature need random numbers, and filters need both")
    columns = [x for x in (temperature, uniforms) if x is not None]
    if filters is not None:
        columns += [filters.top_k, filters.top_p, filters.min_p]
    if any(x.shape != scores.shape[:1] or not x.is_contiguous() for x in columns):
        raise ValueError("temperatures, random numbers and filters are one contiguous value a row")
    if scores.is_cuda and scores.stride(1) == 1:
        from kernels.gpu import choice as gpu

        return gpu.choose_tokens(
            scores, temperature=temperature, uniforms=uniforms, filters=filters
        )
    return choose_tokens_reference(
        scores, temperature=temperature, uniforms=uniforms, filters=filters
    )


def choose_tokens_reference(
    scores: Tensor,
    *,
    temperature: Tensor | None = None,
    uniforms: Tensor | None = None,
    filters: Filters | None = None,
) -> Tensor:
    """`choose_tokens` in torch, which looks on the host for the rows that need something."""
    missing = -scores.shape[1] % CHUNK
    if missing:
        scores = torch.nn.functional.pad(scores, (0, missing), value=-torch.inf)
    if temperature is None or uniforms is None:
        return _largest(scores)
    is_random = temperature > 0.0
    if bool(is_random.all()):
        return _choose(scores.float(), temperature, uniforms, filters)
    chosen = _largest(scores)
    rows = is_random.nonzero().squeeze(-1)
    if len(rows):
        chosen[rows] = _choose(
            scores[rows].float(),
            temperature[rows],
            uniforms[rows],
            None if filters is None else filters.of(rows),
        )
    return chosen


def weigh(scores: Tensor, temperature: Tensor) -> Tensor:
    """Weights in place of float32 `scores`, 1 for a row's largest."""
    peaks = scores.amax(-1, keepdim=True)
    return scores.sub_(peaks).div_(temperature.unsqueeze(-1)).exp_()


def draw(weights: Tensor, uniforms: Tensor) -> Tensor:
    """Index i of each row with probability weights[i] / sum(weights), never one of weight 0.

    `weights` is float32 [num_rows, width], not negative, with a positive sum; the width is whole
    chunks.
    """
    chunks = weights.view(weights.shape[0], -1, CHUNK)
    sums = chunks.sum(-1).double()
    ends = sums.cumsum(-1)
    # Strictly below the total, whatever the rounding: so the first end beyond it has weight.
    target = uniforms.unsqueeze(-1) * ends[:, -1:] * _BELOW_ONE
    chunk = _first_beyond(ends, target)
    chosen_sum = sums.gather(-1, chunk)
    share = (target - (ends.gather(-1, chunk) - chosen_sum)) / chosen_sum
    inner_ends = _take_chunk(chunks, chunk.squeeze(-1)).double().cumsum(-1)
    inner = _first_beyond(inner_ends, share.clamp(0.0, _BELOW_ONE) * inner_ends[:, -1:])
    return (chunk * CHUNK + inner).squeeze(-1)


def _choose(
    scores: Tensor, temperature: Tensor, uniforms: Tensor, filters: Filters | None
) -> Tensor:
    """Overwrites `scores`."""
    weights = weigh(scores, temperature)
    if filters is not None:
        is_filtered = (filters.top_k > 0) | (filters.top_p < 1.0) | (filters.min_p > 0.0)
        if bool(is_filtered.all()):
            weights = _filtered(weights, filters)
        elif bool(is_filtered.any()):
            rows = is_filtered.nonzero().squeeze(-1)
            weights[rows] = _filtered(weights[rows], filters.of(rows))
    return draw(weights, uniforms)


def _filtered(weights: Tensor, filters: Filters) -> Tensor:
    return filter_weights(
        weights,
        top_k=filters.top_k,
        top_p=filters.top_p,
        min_p=filters.min_p if bool(filters.min_p.any()) else None,
        max_top_k=int(filters.top_k.max()) if bool(filters.top_k.all()) else None,
    )


def _largest(scores: Tensor) -> Tensor:
    """Index of each row's largest value, the first of equals; the width is whole chunks."""
    chunks = scores.view(scores.shape[0], -1, CHUNK)
    chunk = chunks.amax(-1).argmax(-1)
    return chunk * CHUNK + _take_chunk(chunks, chunk).argmax(-1)


def _first_beyond(ends: Tensor, target: Tensor) -> Tensor:
    """Index of the first of each row's ascending `ends` that is > target: [n, 1]."""
    index = (ends <= target).sum(-1, keepdim=True)
    return index.clamp_(max=ends.shape[-1] - 1)


def _take_chunk(chunks: Tensor, chunk: Tensor) -> Tensor:
    """Chunk `chunk[i]` of row i: [n, CHUNK]."""
    return chunks[torch.arange(chunks.shape[0], device=chunks.device), chunk]
