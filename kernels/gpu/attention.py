"""Which kernel attends for which rows of a step."""

import functools
from typing import Any

import torch
from torch import Tensor

from kernels.attention import AttentionBatch
from kernels.gpu.decode_attention import decode_attention
from kernels.gpu.decode_rope import NewTokens, rotates_whole_heads
from kernels.gpu.hopper.support import is_supported
from kernels.gpu.prefill_attention import prefill_attention

__all__ = ["NewTokens", "decode_attention", "paged_attention", "parts_to_attend", "rotates"]

# Whether attention of one query a sequence rotates it, or a kernel of its own before it does.
ROTATES_IN_ATTENTION = True


def rotates(q: Tensor, cos_sin: Tensor, batch: AttentionBatch) -> bool:
    """Whether `decode_attention` had better rotate queries and store new tokens on its way."""
    return (
        ROTATES_IN_ATTENTION
        and batch.max_query_len == 1
        and rotates_whole_heads(q.shape[2], cos_sin.shape[1])
    )


def parts_to_attend(
    q: Tensor,
    kv_pool: Tensor,
    batch: AttentionBatch,
    *,
    sliding_window: int | None,
    softcap: float | None,
) -> tuple[AttentionBatch, ...]:
    """Parts of `batch` that have a kernel of their own each, its rows in order."""
    if batch.parts is None:
        return (batch,)
    # Hopper's kernel reads decode rows' blocks while it computes prompts; the portable one is
    # slower at both than kernels of their own.
    is_whole = not batch.attends_in_parts and is_supported(
        q, kv_pool, batch, sliding_window=sliding_window, softcap=softcap
    )
    return (batch,) if is_whole else batch.parts


def paged_attention(
    q: Tensor,
    kv_pool: Tensor,
    layer: int,
    batch: AttentionBatch,
    *,
    scale: float,
    v_scale: float,
    sliding_window: int | None,
    softcap: float | None,
    out: Tensor | None = None,
) -> Tensor:
    """`kernels.attention.paged_attention`; `scale` includes that of keys in an 8-bit pool."""
    if out is None:
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    limits: dict[str, Any] = {"sliding_window": sliding_window, "softcap": softcap}
    first = 0
    for part in parts_to_attend(q, kv_pool, batch, **limits):
        end = first + part.num_tokens
        rows, target = q[first:end], out[first:end]
        if part.max_query_len == 1:
            attend = functools.partial(decode_attention, **limits)
        elif is_supported(rows, kv_pool, part, **limits):
            from kernels.gpu.hopper.attention import hopper_attention

            attend = hopper_attention
        else:
            attend = functools.partial(prefill_attention, **limits)
        attend(rows, kv_pool, layer, part, scale=scale, v_scale=v_scale, out=target)
        first = end
    return out
