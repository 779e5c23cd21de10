"""Which calls Hopper's kernels take; asking doesn't import them."""

import functools

import torch
import triton
from torch import Tensor

from kernels.attention import AttentionBatch
from kernels.gpu.block_memory import pays_off
from kernels.gpu.cards import is_hopper_card

# Gluon still changes between releases; these compile the kernels.
_TRITON_VERSIONS = ("3.6.", "3.7.")
_HEAD_DIMS = (64, 128)
# Its halves are the two lines of shared memory that such a head has.
_ROTATED_HEAD_DIM = 128
_MIN_BLOCK_SIZE = 8
_MAX_GROUP = 64


def is_supported(
    q: Tensor,
    kv_pool: Tensor,
    batch: AttentionBatch,
    *,
    sliding_window: int | None,
    softcap: float | None,
) -> bool:
    """Whether `hopper_attention` can stand in for `prefill_attention`, and so should: it is
    faster at every shape of benchmarks/gpu/kernels.py."""
    _, num_heads, head_dim = q.shape
    num_kv_heads, block_size = kv_pool.shape[3:5]
    is_power_of_2 = block_size & (block_size - 1) == 0
    return (
        sliding_window is None
        and softcap is None
        and q.dtype in (torch.bfloat16, torch.float16)
        and head_dim in _HEAD_DIMS
        and block_size >= _MIN_BLOCK_SIZE
        and is_power_of_2
        and num_heads // num_kv_heads <= _MAX_GROUP
        and is_hopper(q.device)
        and (q.dtype is kv_pool.dtype or pays_off(kv_pool, batch, q.dtype))
    )


def rotates_heads(head_dim: int, rotary_dim: int) -> bool:
    """Whether `hopper_attention` can rotate queries of such heads itself."""
    return head_dim == rotary_dim == _ROTATED_HEAD_DIM


@functools.cache
def is_hopper(device: torch.device) -> bool:
    """Whether it's one, and Triton compiles for it what is in this folder."""
    return is_hopper_card(device) and triton.__version__.startswith(_TRITON_VERSIONS)
