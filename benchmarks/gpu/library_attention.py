"""Attention of prompts by other libraries, on the keys and values of a paged pool.

They get copies in one piece for each sequence, which they take fastest, made before they are timed.
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from kernels.attention import AttentionBatch
from kernels.gpu.flash_attention import library


def library_calls(
    q: Tensor, pool: Tensor, layer: int, batch: AttentionBatch, *, scale: float
) -> dict[str, Callable[[], Tensor]]:
    """Those that take the shape, to results of [num_seqs, num_queries, num_heads, head_dim].

    cuDNN's through torch knows no context; FlashAttention 3's is there where it is installed.
    `batch` has sequences of one length and as many queries each.
    """
    queries = q.unflatten(0, (batch.num_seqs, batch.max_query_len))
    blocks = pool.select(1, layer)[batch.block_tables]
    k, v = blocks.permute(2, 0, 1, 4, 3, 5).flatten(2, 3)[:, :, : batch.max_kv_len]
    calls: dict[str, Callable[[], Tensor]] = {}
    if batch.max_query_len == batch.max_kv_len:
        heads_first = [x.transpose(1, 2) for x in (queries, k, v)]
        calls["cudnn"] = functools.partial(_cudnn, *heads_first, scale=scale)
    try:
        attend = library().flash_attn_func
    except ImportError:
        return calls
    # Its causal mask ends at the last query and the last token, as ours does.
    calls["flash_attention_3"] = functools.partial(
        attend, queries, k, v, softmax_scale=scale, causal=True
    )
    return calls


def _cudnn(q: Tensor, k: Tensor, v: Tensor, *, scale: float) -> Tensor:
    attention = torch.ops.aten._scaled_dot_product_cudnn_attention  # noqa: SLF001
    out, *_ = attention(q, k, v, None, compute_log_sumexp=True, is_causal=True, scale=scale)
    return out.transpose(1, 2)
