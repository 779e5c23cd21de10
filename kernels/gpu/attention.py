"""Which kernel attends for which rows of a step."""

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from kernels.attention import AttentionBatch
from kernels.gpu.decode_attention import decode_attention
from kernels.gpu.decode_plan import plan_contexts
from kernels.gpu.decode_rope import NewTokens, rotates_whole_heads
from kernels.gpu.flash_attention import flash_attention
from kernels.gpu.flash_attention import is_supported as is_for_flash_attention
from kernels.gpu.flash_attention import rotates as flash_attention_rotates
from kernels.gpu.hopper.support import is_supported, rotates_heads
from kernels.gpu.prefill_attention import prefill_attention

__all__ = [
    "NewTokens",
    "decode_attention",
    "paged_attention",
    "parts_to_attend",
    "prepare",
    "rotates",
    "rotates_prompts",
]

# Whether attention rotates queries where it can, or a kernel of its own always does before it.
ROTATES_IN_ATTENTION = True


def prepare(batch: AttentionBatch, kv_pool: Tensor, sliding_windows: Iterable[int | None]) -> None:
    """`kernels.attention.prepare`."""
    decodes = batch if batch.parts is None else batch.parts[0]
    if decodes.max_query_len == 1:
        for window in sliding_windows:
            if window not in decodes.decode_plans:
                decodes.decode_plans[window] = plan_contexts(decodes, kv_pool, window)


def rotates(q: Tensor, cos_sin: Tensor, batch: AttentionBatch) -> bool:
    """Whether `decode_attention` had better rotate queries and store new tokens on its way."""
    return (
        ROTATES_IN_ATTENTION
        and batch.max_query_len == 1
        and rotates_whole_heads(q.shape[2], cos_sin.shape[1])
    )


def rotates_prompts(
    q: Tensor,
    cos_sin: Tensor,
    kv_pool: Tensor,
    batch: AttentionBatch,
    *,
    sliding_window: int | None,
    softcap: float | None,
) -> bool:
    """Whether `paged_attention` had better rotate the queries of one part on its way; their new
    tokens are stored before."""
    limits: dict[str, Any] = {"sliding_window": sliding_window, "softcap": softcap}
    if not ROTATES_IN_ATTENTION:
        return False
    if is_for_flash_attention(q, kv_pool, batch, **limits):
        return flash_attention_rotates(kv_pool)
    can_rotate = rotates_heads(q.shape[2], cos_sin.shape[1])
    return can_rotate and _has_hopper_kernel(q, kv_pool, batch, **limits)


def _has_hopper_kernel(
    q: Tensor,
    kv_pool: Tensor,
    part: AttentionBatch,
    *,
    sliding_window: int | None,
    softcap: float | None,
) -> bool:
    return part.max_query_len > 1 and is_supported(
        q, kv_pool, part, sliding_window=sliding_window, softcap=softcap
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
    limits: dict[str, Any] = {"sliding_window": sliding_window, "softcap": softcap}
    # Hopper's kernel reads decode rows' blocks while it computes prompts; the portable one is
    # slower at both than kernels of their own. FlashAttention is for prompts alone.
    is_whole = (
        not batch.attends_in_parts
        and not is_for_flash_attention(q, kv_pool, batch.parts[1], **limits)
        and is_supported(q, kv_pool, batch, **limits)
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
    cos_sin: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """`kernels.attention.paged_attention`; `scale` includes that of keys in an 8-bit pool.

    With `cos_sin`, which is for what `rotates_prompts` says yes to, queries are rotated first, as
    by `kernels.rope.rope_and_store_kv`; `q` stays as it is.
    """
    limits: dict[str, Any] = {"sliding_window": sliding_window, "softcap": softcap}
    scales = {"scale": scale, "v_scale": v_scale}
    parts = parts_to_attend(q, kv_pool, batch, **limits)
    if len(parts) == 1:
        attend = _kernel_for(q, kv_pool, parts[0], cos_sin, **limits)
        # Without `out`, FlashAttention's result needs no copy.
        return attend(q, kv_pool, layer, parts[0], **scales, out=out)
    if out is None:
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    first = 0
    for part in parts:
        rows = slice(first, first + part.num_tokens)
        attend = _kernel_for(q[rows], kv_pool, part, cos_sin, **limits)
        attend(q[rows], kv_pool, layer, part, **scales, out=out[rows])
        first = rows.stop
    return out


def _kernel_for(
    q: Tensor,
    kv_pool: Tensor,
    part: AttentionBatch,
    cos_sin: Tensor | None,
    *,
    sliding_window: int | None,
    softcap: float | None,
) -> Callable[..., Tensor]:
    limits: dict[str, Any] = {"sliding_window": sliding_window, "softcap": softcap}
    if is_for_flash_attention(q, kv_pool, part, **limits):
        return functools.partial(flash_attention, softcap=softcap, cos_sin=cos_sin)
    if _has_hopper_kernel(q, kv_pool, part, **limits):
        from kernels.gpu.hopper.attention import hopper_attention

        return functools.partial(hopper_attention, cos_sin=cos_sin)
    assert cos_sin is None
    kernel = decode_attention if part.max_query_len == 1 else prefill_attention
    return functools.partial(kernel, **limits)
