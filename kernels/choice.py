"""Tokens from scores: the largest, or one chosen by a random number after top-k, top-p and min-p.

A row is cut into chunks of `CHUNK` values. One vectorised pass reduces each chunk; the search
itself then looks at the few chunk results and at one chunk. On a CPU that's an order of magnitude
faster than `argmax` or `cumsum` over the row, and sums of float32 stay short enough to be exact
to their last bits. Rows never mix, so a row's result doesn't depend on its neighbours.
"""

import torch
from torch import Tensor

from kernels.sampling import filter_weights

CHUNK = 256
_BELOW_ONE = 1.0 - 2.0**-53


def choose_tokens(
    scores: Tensor,
    *,
    temperature: Tensor | None = None,
    uniforms: Tensor | None = None,
    top_k: Tensor | None = None,
    top_p: Tensor | None = None,
    min_p: Tensor | None = None,
) -> Tensor:
    """One index a row of `scores` [num_rows, width], float of any kind: int64 [num_rows].

    A row whose `temperature` (float32 [num_rows]) is 0 takes the first of its largest scores, as
    all do without it. The others choose i with a probability that goes with
    exp(scores[i] / temperature), by `uniforms` (float64 [num_rows], in [0, 1)), among what the
    filters leave: `filter_weights` says what they mean. `top_k`, `top_p` and `min_p` are
    [num_rows], all or none of them. `scores` may be overwritten.

    On a GPU nothing here waits for the device.
    """
    columns = [x for x in (temperature, uniforms, top_k, top_p, min_p) if x is not None]
    if any(x.shape != scores.shape[:1] or not x.is_contiguous() for x in columns):
        raise ValueError("temperatures, random numbers and filters are one for each row")
    if len(columns) not in (0, 2, 5) or (columns and (temperature is None or uniforms is None)):
        raise ValueError("rows are all greedy, or have temperatures, random numbers and filters")
    if scores.is_cuda and scores.stride(1) == 1:
        from kernels.gpu import sampling as gpu

        return gpu.choose_tokens(
            scores,
            temperature=temperature,
            uniforms=uniforms,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
        )
    return choose_tokens_reference(
        scores,
        temperature=temperature,
        uniforms=uniforms,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
    )


def choose_tokens_reference(
    scores: Tensor,
    *,
    temperature: Tensor | None = None,
    uniforms: Tensor | None = None,
    top_k: Tensor | None = None,
    top_p: Tensor | None = None,
    min_p: Tensor | None = None,
) -> Tensor:
    """`choose_tokens` in torch; asks the device which rows are which."""
    missing = -scores.shape[1] % CHUNK
    if missing:
        scores = torch.nn.functional.pad(scores, (0, missing), value=-torch.inf)
    if temperature is None or uniforms is None:
        return _largest(scores)
    is_random = temperature > 0.0
    if bool(is_random.all()):
        return _choose(scores.float(), temperature, uniforms, top_k, top_p, min_p)
    chosen = _largest(scores)
    random = is_random.nonzero().squeeze(-1)
    if len(random):
        chosen[random] = _choose(
            scores[random].float(),
            temperature[random],
            uniforms[random],
            *(None if x is None else x[random] for x in (top_k, top_p, min_p)),
        )
    return chosen


def _choose(
    scores: Tensor,
    temperature: Tensor,
    uniforms: Tensor,
    top_k: Tensor | None,
    top_p: Tensor | None,
    min_p: Tensor | None,
) -> Tensor:
    """Overwrites `scores`."""
    scores.sub_(scores.amax(-1, keepdim=True)).div_(temperature.unsqueeze(-1))
    weights = scores.exp_()
    if top_k is not None and top_p is not None and min_p is not None:
        is_filtered = (top_k > 0) | (top_p < 1.0) | (min_p > 0.0)
        if bool(is_filtered.all()):
            weights = _filtered(weights, top_k, top_p, min_p)
        elif bool(is_filtered.any()):
            index = is_filtered.nonzero().squeeze(-1)
            weights[index] = _filtered(weights[index], top_k[index], top_p[index], min_p[index])
    return _draw(weights, uniforms)


def _filtered(weights: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    return filter_weights(
        weights,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p if bool(min_p.any()) else None,
        max_top_k=int(top_k.max()) if bool(top_k.all()) else None,
    )


def _largest(scores: Tensor) -> Tensor:
    """Index of each row's largest value, the first of equals; the width is whole chunks."""
    chunks = scores.view(scores.shape[0], -1, CHUNK)
    chunk = chunks.amax(-1).argmax(-1)
    return chunk * CHUNK + _take_chunk(chunks, chunk).argmax(-1)


def _draw(weights: Tensor, uniforms: Tensor) -> Tensor:
    """Index i of each row with probability weights[i] / sum(weights), never one of weight 0."""
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


def _first_beyond(ends: Tensor, target: Tensor) -> Tensor:
    """Index of the first of each row's ascending `ends` that is > target: [n, 1]."""
    index = (ends <= target).sum(-1, keepdim=True)
    return index.clamp_(max=ends.shape[-1] - 1)


def _take_chunk(chunks: Tensor, chunk: Tensor) -> Tensor:
    """Chunk `chunk[i]` of row i: [n, CHUNK]."""
    return chunks[torch.arange(chunks.shape[0], device=chunks.device), chunk]
