"""FlashAttention 3's function that we call, in torch; takes what its wheel takes, and no more."""

import torch
from torch import Tensor

from kernels.fp8 import FP8


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    cache_seqlens: Tensor,
    cu_seqlens_q: Tensor,
    max_seqlen_q: int,
    softmax_scale: float,
    causal: bool,
    v_descale: Tensor | None = None,
    softcap: float = 0.0,
    num_splits: int = 0,
) -> Tensor:
    """`q` [num_tokens, num_heads, head_dim], caches [num_seqs, tokens, num_kv_heads, head_dim]."""
    assert causal
    assert num_splits == 1
    assert q.dtype is k_cache.dtype is v_cache.dtype
    assert q.stride(-1) == k_cache.stride(-1) == v_cache.stride(-1) == 1
    assert max_seqlen_q == int(cu_seqlens_q.diff().max())
    assert v_descale is None or v_descale.shape == (len(k_cache), k_cache.shape[2])
    assert q.dtype is not FP8 or not softcap
    out = torch.empty(q.shape, dtype=torch.bfloat16, device=q.device)
    starts = cu_seqlens_q.tolist()
    group = q.shape[1] // k_cache.shape[2]
    for i, kv_len in enumerate(cache_seqlens.tolist()):
        rows = slice(starts[i], starts[i + 1])
        num_queries = rows.stop - rows.start
        # Tiles of tokens are multiplied whole.
        num_tokens = min(k_cache.shape[1], -(-kv_len // 224) * 224)
        k, v = (
            cache[i, :num_tokens].float().repeat_interleave(group, 1)
            for cache in (k_cache, v_cache)
        )
        if v_descale is not None:
            v *= v_descale[i].repeat_interleave(group)[:, None]
        scores = torch.einsum("qhd,khd->hqk", q[rows].float(), k) * softmax_scale
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        last_seen = torch.arange(kv_len - num_queries, kv_len, device=q.device)
        is_hidden = torch.arange(num_tokens, device=q.device) > last_seen[:, None]
        weights = scores.masked_fill(is_hidden, -torch.inf).softmax(-1)
        out[rows] = torch.einsum("hqk,khd->qhd", weights, v).bfloat16()
    return out
