"""RoPE, storing keys and values, and attention: what comes between two products of a layer."""

from torch import Tensor

from kernels.attention import AttentionBatch, paged_attention
from kernels.kv_format import UNSCALED, KVScales, scales_of
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
) -> Tensor:
    """`kernels.rope.rope_and_store_kv`, then `kernels.attention.paged_attention`, whose result it
    returns; one kernel where each sequence has one query. `q` may be overwritten.

    No sequence's context may hold another's new token.
    """
    if q.is_cuda:
        from kernels.gpu import attention as gpu

        check_rope(q, k, v, cos_sin, kv_pool)
        assert 0 <= layer < kv_pool.shape[1]
        if gpu.rotates(q, cos_sin, batch):
            scales = scales_of(kv_pool, kv_scales)
            new = gpu.NewTokens(k, v, cos_sin, scales)
            options = {"sliding_window": sliding_window, "v_scale": scales.v}
            return gpu.decode_attention(
                q, kv_pool, layer, batch, scale=scale * scales.k, new=new, softcap=None, **options
            )
    rope_and_store_kv(q, k, v, cos_sin, batch, kv_pool, layer, kv_scales=kv_scales)
    return paged_attention(
        q, kv_pool, layer, batch, scale=scale, sliding_window=sliding_window, kv_scales=kv_scales
    )
