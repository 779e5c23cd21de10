"""top-k, top-p and min-p as a floor under a row's weights, found without sorting the row.

A filter keeps all weights at or above a floor. Equal weights are kept or dropped together, so
the outcome doesn't depend on how a sort would have ordered them, nor on other rows.
"""

import torch
from torch import Tensor

# A row is sorted as a whole only if its floor isn't among so many largest weights.
MAX_CANDIDATES = 256
FEW_CANDIDATES = 64


def filter_weights(
    weights: Tensor, *, top_k: Tensor, top_p: Tensor, min_p: Tensor | None, num_candidates: int
) -> Tensor:
    """`weights` with those set to 0 that the filters exclude, changed in place.

    `weights` is float32 [n, width], each row's largest 1. `top_k` int64 [n], 0 for none; `top_p`
    float32 [n], 1 for none; `min_p` float32 [n]. As in vLLM, each filter sees what the one
    before left: min-p, then top-k, then top-p.
    """
    if min_p is not None:
        weights.mul_(weights >= min_p.unsqueeze(-1))
    candidates = weights.topk(min(num_candidates, weights.shape[-1]), dim=-1).values
    totals = weights.sum(-1, dtype=torch.float64)
    floor, found = _floors(candidates, totals, top_k, top_p)
    if not bool(found.all()):
        missing = (~found).nonzero().squeeze(-1)
        ranked = weights[missing].sort(-1, descending=True).values
        floor[missing], _ = _floors(ranked, totals[missing], top_k[missing], top_p[missing])
    return weights.mul_(weights >= floor.unsqueeze(-1))


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
