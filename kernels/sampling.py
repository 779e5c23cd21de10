"""What sampling does to rows as wide as a vocabulary before it chooses: penalties and filters.

A filter (top-k, top-p, min-p) is a floor under a row's weights: all at or above it stay. Equal
weights stay or go together, so the outcome doesn't depend on how a sort would order them, nor on
other rows.
"""

from ctypes import byref

import torch
from torch import Tensor

from kernels.native.arguments import FilterWeightsArgs, PenalizeArgs, RuleOutArgs
from kernels.native.library import Operation, native_kernel

# The reference sorts a row as a whole only if its floor isn't among so many largest weights.
_FEW_CANDIDATES = 64
_MANY_CANDIDATES = 256


def filter_weights(
    weights: Tensor,
    *,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor | None,
    max_top_k: int | None = None,
) -> Tensor:
    """`weights` with those set to 0 that the filters exclude; changed in place where possible.

    `weights` is float32 [num_rows, width], not negative, the largest of each row 1. `top_k` is
    int64 [num_rows], 0 for none; `top_p` float32 [num_rows], 1 for none; `min_p` float32
    [num_rows]. As in vLLM, each filter sees what the one before left: min-p, then top-k, then
    top-p. `max_top_k` is the largest top-k if every row has one, which the host may know.
    """
    _check_rows(weights, top_k, top_p, *(() if min_p is None else (min_p,)))
    if weights.is_cuda and weights.is_contiguous() and weights.dtype is torch.float32:
        from kernels.gpu import filters as gpu

        return gpu.filter_weights(weights, top_k=top_k, top_p=top_p, min_p=min_p)
    kernel = native_kernel(Operation.FILTER_WEIGHTS, weights)
    if kernel is not None and weights.is_contiguous():
        args = FilterWeightsArgs(
            weights=weights.data_ptr(),
            top_k=top_k.data_ptr(),
            top_p=top_p.data_ptr(),
            min_p=None if min_p is None else min_p.data_ptr(),
            rows=weights.shape[0],
            n=weights.shape[1],
            num_threads=torch.get_num_threads(),
        )
        if kernel(byref(args)):
            return weights
    return filter_weights_reference(
        weights, top_k=top_k, top_p=top_p, min_p=min_p, max_top_k=max_top_k
    )


def filter_weights_reference(
    weights: Tensor,
    *,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor | None,
    max_top_k: int | None = None,
) -> Tensor:
    """`filter_weights` in torch."""
    if min_p is not None:
        weights.mul_(weights >= min_p.unsqueeze(-1))
    few_suffice = max_top_k is not None and max_top_k <= _FEW_CANDIDATES
    num_candidates = _FEW_CANDIDATES if few_suffice else _MANY_CANDIDATES
    candidates = weights.topk(min(num_candidates, weights.shape[-1]), dim=-1).values
    totals = weights.sum(-1, dtype=torch.float64)
    floor, found = _floors(candidates, totals, top_k, top_p)
    if not bool(found.all()):
        missing = (~found).nonzero().squeeze(-1)
        ranked = weights[missing].sort(-1, descending=True).values
        floor[missing], _ = _floors(ranked, totals[missing], top_k[missing], top_p[missing])
    return weights.mul_(weights >= floor.unsqueeze(-1))


def penalize(
    scores: Tensor,
    *,
    places: Tensor,
    slots: Tensor,
    output_counts: Tensor,
    in_prompt: Tensor,
    repetition: Tensor,
    presence: Tensor,
    frequency: Tensor,
) -> None:
    """Penalties on the rows `places` of `scores` float32 [num_rows, >= vocab_size], in place.

    Row `places[i]` has its counts in row `slots[i]` of `output_counts` int32 and `in_prompt` bool
    [num_slots, vocab_size]; `places` and `slots` are int64, the penalties float32, all [n].
    OpenAI's formula and, for repetition, CTRL's (arXiv:1909.05858), as vLLM has them.
    """
    _check_rows(places, slots, repetition, presence, frequency)
    if output_counts.shape != in_prompt.shape or scores.shape[1] < in_prompt.shape[1]:
        raise ValueError(
            f"scores {tuple(scores.shape)}, output_counts {tuple(output_counts.shape)} and "
            f"in_prompt {tuple(in_prompt.shape)} don't fit"
        )
    if scores.is_cuda and scores.stride(1) == 1:
        from kernels.gpu import scores as gpu

        gpu.penalize(
            scores,
            places=places,
            slots=slots,
            output_counts=output_counts,
            in_prompt=in_prompt,
            repetition=repetition,
            presence=presence,
            frequency=frequency,
        )
        return
    kernel = native_kernel(Operation.PENALIZE, scores)
    if kernel is None or scores.stride(1) != 1:
        penalize_reference(
            scores,
            places=places,
            slots=slots,
            output_counts=output_counts,
            in_prompt=in_prompt,
            repetition=repetition,
            presence=presence,
            frequency=frequency,
        )
        return
    args = PenalizeArgs(
        scores=scores.data_ptr(),
        places=places.data_ptr(),
        slots=slots.data_ptr(),
        output_counts=output_counts.data_ptr(),
        in_prompt=in_prompt.data_ptr(),
        repetition=repetition.data_ptr(),
        presence=presence.data_ptr(),
        frequency=frequency.data_ptr(),
        rows=len(places),
        n=in_prompt.shape[1],
        score_stride=scores.stride(0),
        num_threads=torch.get_num_threads(),
    )
    kernel(byref(args))


def penalize_reference(
    scores: Tensor,
    *,
    places: Tensor,
    slots: Tensor,
    output_counts: Tensor,
    in_prompt: Tensor,
    repetition: Tensor,
    presence: Tensor,
    frequency: Tensor,
) -> None:
    """`penalize` in torch."""
    vocab_size = in_prompt.shape[1]
    logits = scores[places, :vocab_size]
    counts = output_counts[slots]
    in_output = counts > 0
    factor = torch.where(in_output | in_prompt[slots], repetition.unsqueeze(-1), 1.0)
    logits = torch.where(logits > 0, logits / factor, logits * factor)
    logits.addcmul_(frequency.unsqueeze(-1), counts, value=-1.0)
    logits.addcmul_(presence.unsqueeze(-1), in_output, value=-1.0)
    scores[places, :vocab_size] = logits


def rule_out(scores: Tensor, *, places: Tensor, allowed: Tensor) -> None:
    """Sets to -inf, in place, the scores of rows `places` that their masks don't allow.

    `scores` is float32 [num_rows, width], `places` int64 [n] on its device, `allowed` int32
    [n, words] on the CPU or that device: bit i % 32 of word i // 32 for score i. What a mask is
    too short for is not allowed.
    """
    if allowed.dim() != 2 or len(allowed) != len(places) or not allowed.is_contiguous():
        raise ValueError(f"{tuple(allowed.shape)} is not one contiguous mask for a row")
    if scores.is_cuda and scores.stride(1) == 1:
        from kernels.gpu import scores as gpu

        if allowed.is_cpu:
            # From pageable memory the copy would wait for all that the device has yet to do.
            allowed = allowed.pin_memory().to(scores.device, non_blocking=True)
        gpu.rule_out(scores, places=places, allowed=allowed)
        return
    kernel = native_kernel(Operation.RULE_OUT, scores)
    if kernel is None or scores.stride(1) != 1:
        rule_out_reference(scores, places=places, allowed=allowed)
        return
    args = RuleOutArgs(
        scores=scores.data_ptr(),
        places=places.data_ptr(),
        allowed=allowed.data_ptr(),
        rows=len(places),
        n=scores.shape[1],
        words=allowed.shape[1],
        score_stride=scores.stride(0),
        num_threads=torch.get_num_threads(),
    )
    kernel(byref(args))


def rule_out_reference(scores: Tensor, *, places: Tensor, allowed: Tensor) -> None:
    """`rule_out` in torch."""
    width = scores.shape[1]
    bits = torch.arange(32, dtype=torch.int32, device=scores.device)
    allowed = allowed.to(scores.device, non_blocking=True)
    forbidden = ((allowed.unsqueeze(-1) >> bits) & 1 == 0).flatten(1)[:, :width]
    missing = width - forbidden.shape[1]
    if missing > 0:
        forbidden = torch.nn.functional.pad(forbidden, (0, missing), value=True)
    scores[places] = scores[places].masked_fill_(forbidden, -torch.inf)


def _floors(ranked: Tensor, totals: Tensor, top_k: Tensor, top_p: Tensor) -> tuple[Tensor, Tensor]:
    """Each row's floor, and whether its `ranked` (largest weights, descending) sufficed."""
    num_ranked = ranked.shape[-1]
    has_k = top_k > 0
    k_index = top_k.clamp(1, num_ranked).unsqueeze(-1) - 1
    k_floor = torch.where(has_k, ranked.gather(-1, k_index).squeeze(-1), 0.0)
    ends = ranked.cumsum(-1, dtype=torch.float64)
    # The first k alone count: how many equals of the k-th there are may lie beyond `ranked`.
    wanted = top_p * torch.where(has_k, ends.gather(-1, k_index).squeeze(-1), totals)
    p_index = (ends < wanted.unsqueeze(-1)).sum(-1, keepdim=True)
    p_floor = ranked.gather(-1, p_index.clamp(max=num_ranked - 1)).squeeze(-1)
    p_floor = torch.where(top_p < 1.0, p_floor, 0.0)
    k_found = top_k <= num_ranked
    p_found = (top_p >= 1.0) | (p_index.squeeze(-1) < num_ranked)
    return torch.maximum(k_floor, p_floor), k_found & p_found


def _check_rows(first: Tensor, *others: Tensor) -> None:
    for other in others:
        if other.dim() != 1 or len(other) != len(first) or not other.is_contiguous():
            raise ValueError(f"{tuple(other.shape)} is not one contiguous value for a row")
