"""Attention of prompts by FlashAttention 3 (arXiv:2407.08608), a library for Hopper GPUs.

It multiplies the 8 bits of an 8-bit pool as they are, which is faster than to widen them; queries
and the weights of values are then rounded to 8 bits, too. Asking what it takes doesn't import it.
"""

import functools
import importlib
from typing import Any

import torch
from torch import Tensor

from kernels.attention import AttentionBatch
from kernels.fp8 import FP8
from kernels.gpu.block_memory import pays_off
from kernels.gpu.fp8 import saturate_rows
from kernels.gpu.gathered_blocks import gather_blocks
from kernels.gpu.rope import rotated_fp8

# As its repository builds it (hopper/), and as the wheel fa3-fwd has it.
_MODULES = ("flash_attn_interface", "fa3_fwd_interface")
KV_DTYPES = (torch.bfloat16, FP8)
HEAD_DIMS = (64, 96, 128, 256)


@functools.cache
def library() -> Any:  # noqa: ANN401  (a module)
    """FlashAttention 3. Raises ImportError where it isn't, or can't be loaded."""
    for name in _MODULES:
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name != name:
                raise
    raise ImportError(f"there is no module {' or '.join(_MODULES)}")


def is_supported(
    q: Tensor,
    kv_pool: Tensor,
    batch: AttentionBatch,
    *,
    sliding_window: int | None,
    softcap: float | None,
) -> bool:
    """Whether `flash_attention` attends for this batch: it is to be used, can do it and pays off.

    All this depends on is known to the host. In captured graphs nobody asks for it: they have so
    many (padded) sequences that it never would pay off.
    """
    return (
        batch.uses_flash_attention
        and batch.max_query_len > 1
        # The wheel is built without windows, and has no softcap in 8 bits.
        and sliding_window is None
        and (softcap is None or kv_pool.dtype is q.dtype)
        and q.dtype is torch.bfloat16
        and kv_pool.dtype in KV_DTYPES
        and q.shape[2] in HEAD_DIMS
        and pays_off(kv_pool, batch, kv_pool.dtype)
    )


def rotates(kv_pool: Tensor) -> bool:
    """Whether `flash_attention` had better rotate queries where it attends: it rounds those to the
    8 bits of such a pool anyway."""
    return kv_pool.dtype is FP8


def flash_attention(
    q: Tensor,
    kv_pool: Tensor,
    layer: int,
    batch: AttentionBatch,
    *,
    scale: float,
    v_scale: float = 1.0,
    softcap: float | None = None,
    cos_sin: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """`kernels.attention.paged_attention` where `is_supported` says so; arguments as
    `prefill_attention`'s.

    For an 8-bit pool, queries are rounded to its type, and those beyond ±448 become that. With
    `cos_sin`, for what `rotates` says yes to, they are rotated before.
    """
    # The wheel is built without block tables.
    k, v = gather_blocks(kv_pool, layer, batch)
    v_descale: Tensor | None = None
    if rotates(kv_pool):
        q = saturate_rows(q) if cos_sin is None else rotated_fp8(q, cos_sin, batch.positions)
        if v_scale != 1.0:
            shape = (batch.num_seqs, kv_pool.shape[3])
            v_descale = torch.full(shape, v_scale, dtype=torch.float32, device=q.device)
    else:
        assert cos_sin is None
    attended = library().flash_attn_with_kvcache(
        q,
        k,
        v,
        cache_seqlens=batch.kv_lens,
        cu_seqlens_q=batch.query_starts,
        max_seqlen_q=batch.max_query_len,
        softmax_scale=scale,  # with that of keys
        v_descale=v_descale,
        causal=True,
        softcap=softcap or 0.0,
        num_splits=1,
    )
    return attended if out is None else out.copy_(attended)
