"""Which kernel attends for which rows of a step."""

import torch
from torch import Tensor

from kernels.attention import AttentionBatch
from kernels.gpu.decode_attention import decode_attention
from kernels.gpu.hopper.support import is_supported
from kernels.gpu.prefill_attention import prefill_attention


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
) -> Tensor:
    """`kernels.attention.paged_attention`; `scale` includes that of keys in an 8-bit pool."""
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    first = 0
    for part in batch.parts or (batch,):
        end = first + part.num_tokens if batch.parts else len(q)
        is_decode = part.max_query_len == 1
        options = {"scale": scale, "v_scale": v_scale, "out": out[first:end]}
        if not is_decode and is_supported(
            q[first:end], kv_pool, part, sliding_window=sliding_window, softcap=softcap
        ):
            from kernels.gpu.hopper.attention import hopper_attention

            hopper_attention(q[first:end], kv_pool, layer, part, **options)
        else:
            attend = decode_attention if is_decode else prefill_attention
            attend(
                q[first:end],
                kv_pool,
                layer,
                part,
                sliding_window=sliding_window,
                softcap=softcap,
                **options,
            )
        first = end
    return out
