"""Attention of prompts by other libraries, on the keys and values of a paged pool.

They get copies in one piece for each sequence, which they take fastest, made before they are timed.
"""

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kernels.attention import AttentionBatch

# FlashAttention 3 as its repository builds it (hopper/), and as the wheel fa3-fwd has it.
_FLASH_ATTENTION_3 = ("flash_attn_interface", "fa3_fwd_interface")


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
    flash_attention = _flash_attention_3()
    if flash_attention is not None:
        # Its causal mask ends at the last query and the last token, as ours does.
        calls["flash_attention_3"] = functools.partial(
            flash_attention, queries, k, v, softmax_scale=scale, causal=True
        )
    return calls


def _cudnn(q: Tensor, k: Tensor, v: Tensor, *, scale: float) -> Tensor:
    attention = torch.ops.aten._scaled_dot_product_cudnn_attention  # noqa: SLF001
    out, *_ = attention(q, k, v, None, compute_log_sumexp=True, is_causal=True, scale=scale)
    return out.transpose(1, 2)


def _flash_attention_3() -> Callable[..., Any] | None:
    for name in _FLASH_ATTENTION_3:
        try:
            return importlib.import_module(name).flash_attn_func
        except ImportError:
            continue
    return None
