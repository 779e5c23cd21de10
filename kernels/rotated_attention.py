"""RoPE, storing keys and values, and attention: what comes between two products of a layer."""

from typing import Any

import torch
from torch import Tensor

from kernels.attention import AttentionBatch, paged_attention
from kernels.kv_format import UNSCALED, KVScales, scales_of
from kernels.norm import HeadNorms, rms_norm
from kernels.rope import check_rope, rope_and_store_kv


def rotate_and_attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos_sin: Tensor,
    batch: AttentionBatch,
    kv_pool: Tensor,
    layer: int,
    *,
    scale: float,
    sliding_window: int | None = None,
    kv_scales: KVScales = UNSCALED,
    norms: HeadNorms | None = None,
) -> Tensor:
    """`kernels.rope.rope_and_store_kv`, then `kernels.attention.paged_attention`, whose result it
    returns; where a kernel of attention can rotate queries itself, none does before it. `q` may be
    overwritten.

    No sequence's context may hold another's new token.
    """
    if q.is_cuda:
        check_rope(q, k, v, cos_sin, kv_pool, norms)
        assert 0 <= layer < kv_pool.shape[1]
        return _on_gpu(
            q, k, v, cos_sin, batch, kv_pool, layer, scale, sliding_window, kv_scales, norms
        )
    if norms is not None:
        # To tensors of their own: `rope_and_store_kv` would copy queries back.
        q, k = rms_norm(q, norms.q, norms.eps), rms_norm(k, norms.k, norms.eps)
    rope_and_store_kv(q, k, v, cos_sin, batch, kv_pool, layer, kv_scales=kv_scales)
    return paged_attention(
        q, kv_pool, layer, batch, scale=scale, sliding_window=sliding_window, kv_scales=kv_scales
    )


def _on_gpu(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos_sin: Tensor,
    batch: AttentionBatch,
    kv_pool: Tensor,
    layer: int,
    scale: float,
    sliding_window: int | None,
    kv_scales: KVScales,
    norms: HeadNorms | None,
) -> Tensor:
    from kernels.gpu import attention as gpu

    scales = scales_of(kv_pool, kv_scales)
    limits: dict[str, Any] = {"sliding_window": sliding_window, "softcap": None}
    parts = gpu.parts_to_attend(q, kv_pool, batch, **limits)
    # A kernel that has all rows makes its result itself.
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device) if len(parts) > 1 else None
    result = q
    first = 0
    for part in parts:
        rows = slice(first, first + part.num_tokens)
        options: dict[str, Any] = {"scale": scale * scales.k, "v_scale": scales.v, **limits}
        options["out"] = None if out is None else out[rows]
        if gpu.rotates(q, cos_sin, part):
            new = gpu.NewTokens(k[rows], v[rows], cos_sin, scales, norms)
            result = gpu.decode_attention(q[rows], kv_pool, layer, part, new=new, **options)
        else:
            queries = q[rows]
            # Such kernels rotate what they are given: norms come before that.
            if norms is None and gpu.rotates_prompts(queries, cos_sin, kv_pool, part, **limits):
                queries, options["cos_sin"] = queries[:, :0], cos_sin
            rope_and_store_kv(
                queries,
                k[rows],
                v[rows],
                cos_sin,
                part,
                kv_pool,
                layer,
                kv_scales=kv_scales,
                norms=norms,
            )
            result = gpu.paged_attention(q[rows], kv_pool, layer, part, **options)
        first = rows.stop
    return result if out is None else out
