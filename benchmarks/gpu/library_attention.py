"""Attention by other libraries, on the keys and values of a paged pool.

Those of prompts get copies in one piece for each sequence, which they take fastest, made before
they are timed.
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from kernels.attention import AttentionBatch
from kernels.gpu.flash_attention import library
from kernels.gpu.sizes import ceil_div

FLASHINFER_WORKSPACE_BYTES = 256 << 20
FlashInferCall = Callable[[Tensor, Tensor], Tensor]


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


def flashinfer_calls(
    pool: Tensor, batch: AttentionBatch, dtype: torch.dtype, num_heads: int, *, scale: float
) -> dict[str, FlashInferCall]:
    """FlashInfer's decode attention, planned for `batch`, where it is installed: by its kernels for
    matrix units and by those without. They take queries of `dtype` and a layer of `pool`."""
    try:
        from flashinfer import (  # pyright: ignore[reportMissingImports]
            BatchDecodeWithPagedKVCacheWrapper,
        )
    except ImportError:
        return {}
    num_kv_heads, block_size, head_dim = pool.shape[3:]
    kv_lens = batch.kv_lens.tolist()
    nums_blocks = [ceil_div(length, block_size) for length in kv_lens]
    tables = zip(batch.block_tables, nums_blocks, strict=True)
    blocks = torch.cat([table[:num] for table, num in tables])
    starts = torch.tensor([0, *nums_blocks]).cumsum(0).int()
    in_last = torch.tensor([(length - 1) % block_size + 1 for length in kv_lens]).int()
    calls: dict[str, FlashInferCall] = {}
    for name, uses_matrix_units in (("flashinfer", True), ("flashinfer_plain", False)):
        workspace = torch.empty(FLASHINFER_WORKSPACE_BYTES, dtype=torch.uint8, device=pool.device)
        planned = BatchDecodeWithPagedKVCacheWrapper(
            workspace, "HND", use_tensor_cores=uses_matrix_units
        )
        planned.plan(
            starts.to(pool.device),
            blocks,
            in_last.to(pool.device),
            num_heads,
            num_kv_heads,
            head_dim,
            block_size,
            q_data_type=dtype,
            kv_data_type=pool.dtype,
            sm_scale=scale,
        )
        calls[name] = planned.run
    return calls
