"""Log-probabilities of sampled tokens, for the rows that ask."""

import torch
from torch import Tensor

from engine.upload import to_host
from protocol.request import TokenLogprobs
from protocol.sampling import MAX_LOGPROBS


class PendingLogprobs:
    """The distribution of float32 `logits` [n, vocab_size] around the sampled `token_ids` [n],
    which the device may still be computing.

    `num_top` says for each row how many of the likeliest tokens to name, 0 to MAX_LOGPROBS.
    A token's rank is 1 plus the number of likelier ones.
    """

    def __init__(self, logits: Tensor, token_ids: Tensor, num_top: list[int]) -> None:
        self._num_top = num_top
        normalizer = logits.logsumexp(-1, keepdim=True)
        chosen = logits.gather(-1, token_ids.unsqueeze(-1))
        # Always as many as anyone may ask for: among equals, topk's choice depends on the number.
        count = min(MAX_LOGPROBS, logits.shape[-1]) if any(num_top) else 0
        top = logits.topk(count, dim=-1)
        self._columns = [
            to_host(column)
            for column in (
                (chosen - normalizer).squeeze(-1),
                (logits > chosen).sum(-1) + 1,
                top.indices,
                top.values - normalizer,
            )
        ]

    def read(self) -> list[TokenLogprobs]:
        """One a row; the device has finished by now."""
        columns = (column.tolist() for column in self._columns)
        return [
            TokenLogprobs(logprob, rank, ids[:wanted], values[:wanted])
            for logprob, rank, ids, values, wanted in zip(*columns, self._num_top, strict=True)
        ]


def token_logprobs(logits: Tensor, token_ids: Tensor, num_top: list[int]) -> list[TokenLogprobs]:
    """As `PendingLogprobs`, waiting for the device."""
    pending = PendingLogprobs(logits, token_ids, num_top)
    if logits.is_cuda:
        torch.cuda.current_stream(logits.device).synchronize()
    return pending.read()
