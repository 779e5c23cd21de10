"""Log-probabilities of sampled tokens, for the rows that ask."""

import torch
from torch import Tensor

from protocol.request import TokenLogprobs
from protocol.sampling import MAX_LOGPROBS


def token_logprobs(logits: Tensor, token_ids: Tensor, num_top: list[int]) -> list[TokenLogprobs]:
    """The distribution of float32 `logits` [n, vocab_size] around the sampled `token_ids` [n].

    `num_top` says for each row how many of the likeliest tokens to name, 0 to MAX_LOGPROBS.
    A token's rank is 1 plus the number of likelier ones.
    """
    normalizer = logits.logsumexp(-1, keepdim=True)
    chosen = logits.gather(-1, token_ids.unsqueeze(-1))
    ranks = (logits > chosen).sum(-1) + 1
    # Always as many as anyone may ask for: among equals, topk's choice depends on the number.
    count = min(MAX_LOGPROBS, logits.shape[-1]) if any(num_top) else 0
    top = logits.topk(count, dim=-1)
    columns = zip(
        (chosen - normalizer).squeeze(-1).tolist(),
        ranks.tolist(),
        top.indices.tolist(),
        torch.sub(top.values, normalizer).tolist(),
        num_top,
        strict=True,
    )
    return [
        TokenLogprobs(logprob, rank, ids[:wanted], values[:wanted])
        for logprob, rank, ids, values, wanted in columns
    ]
