"""RoPE, storing and attention as one operation, against one after the other."""

from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from attention_cases import MIXED, TOLERANCE, make_batch, make_pool
from torch import Tensor
from triton_cases import DEVICE, needs_triton

from kernels.attention import AttentionBatch, paged_attention_reference
from kernels.fp8 import FP8
from kernels.gpu import rope
from kernels.gpu.attention import rotates, rotates_prompts
from kernels.gpu.decode_attention import decode_attention
from kernels.gpu.decode_plan import plan_contexts
from kernels.gpu.decode_rope import NewTokens
from kernels.gpu.hopper import support
from kernels.kv_format import KVScales
from kernels.norm import HeadNorms
from kernels.rope import rope_and_store_kv_reference
from kernels.rotated_attention import rotate_and_attend

# The first fills a block, the last but one begins one; the last is a padded row of a graph.
LENGTHS = [64, 1, 40, 16, 129, 33, 5]
HEAD_DIM, BLOCK_SIZE = 64, 16


def make_norms(head_dim: int, dtype: torch.dtype = torch.float32) -> HeadNorms:
    weights = (torch.rand(2, head_dim) + 0.5).to(DEVICE, dtype)
    return HeadNorms(weights[0], weights[1], 0.1)


def make_decode_batch() -> AttentionBatch:
    batch = make_batch([(1, length) for length in LENGTHS], BLOCK_SIZE)
    batch.kv_lens[-1], batch.slots[-1] = 0, -1
    tensors = {field.name: getattr(batch, field.name) for field in fields(batch)}
    return replace(
        batch, **{name: x.to(DEVICE) for name, x in tensors.items() if isinstance(x, Tensor)}
    )


@needs_triton
@pytest.mark.parametrize("heads", [(4, 1), (6, 2)])
@pytest.mark.parametrize(
    ("dtype", "kv_dtype"), [(torch.float32, None), (torch.float16, None), (torch.float16, FP8)]
)
@pytest.mark.parametrize("num_shares", [1, 5, 40])
def test_in_one_kernel(
    heads: tuple[int, int], dtype: torch.dtype, kv_dtype: torch.dtype | None, num_shares: int
) -> None:
    check_in_one_kernel(heads, dtype, kv_dtype, num_shares, head_dim=HEAD_DIM, norms=None)


@needs_triton
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize(
    ("dtype", "kv_dtype"), [(torch.float32, None), (torch.float16, None), (torch.float16, FP8)]
)
def test_norms_in_one_kernel(
    head_dim: int, dtype: torch.dtype, kv_dtype: torch.dtype | None
) -> None:
    torch.manual_seed(1)
    norms = make_norms(head_dim, dtype)
    check_in_one_kernel((6, 2), dtype, kv_dtype, 5, head_dim=head_dim, norms=norms)


def check_in_one_kernel(
    heads: tuple[int, int],
    dtype: torch.dtype,
    kv_dtype: torch.dtype | None,
    num_shares: int,
    *,
    head_dim: int,
    norms: HeadNorms | None,
) -> None:
    torch.manual_seed(0)
    batch, scales = make_decode_batch(), KVScales(k=0.02, v=0.5)
    pool = make_pool(batch, heads[1], BLOCK_SIZE, head_dim).to(DEVICE, kv_dtype or dtype)
    cos_sin = torch.randn(max(LENGTHS), head_dim, device=DEVICE)
    qkv = torch.randn(len(LENGTHS), heads[0] + 2 * heads[1], head_dim).to(DEVICE, dtype)
    # None is the pool's own value before.
    where = [(int(slot) // BLOCK_SIZE, int(slot) % BLOCK_SIZE) for slot in batch.slots[:-1]]
    for block, offset in where:
        pool[block, 1, :, :, offset] = float("nan")
    pools = pool.clone(), pool.clone()
    options: dict[str, Any] = {"scale": 0.1, "sliding_window": None, "softcap": None}
    options["plan"] = plan_contexts(batch, pool, None, num_shares=num_shares)
    q, k, v = qkv.clone().split([heads[0], heads[1], heads[1]], 1)
    rope.rope_and_store_kv(q, k, v, cos_sin, batch, pools[0], 1, kv_scales=scales, norms=norms)
    expected = decode_attention(q, pools[0], 1, batch, v_scale=0.5, **options)
    before = qkv.clone()
    q, k, v = qkv.split([heads[0], heads[1], heads[1]], 1)
    new = NewTokens(k, v, cos_sin, scales, norms)
    actual = decode_attention(q, pools[1], 1, batch, v_scale=0.5, new=new, **options)
    assert torch.equal(qkv, before)
    assert not expected.isnan().any()
    tolerance = TOLERANCE[dtype] if kv_dtype is None else 2e-2
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=tolerance)
    stored = [pool.float().nan_to_num(7.0) for pool in pools]
    torch.testing.assert_close(stored[1], stored[0], atol=0, rtol=2**-3 if kv_dtype else tolerance)


@pytest.mark.parametrize("lengths", [MIXED, [(1, length) for length in LENGTHS]])
@pytest.mark.parametrize("has_norms", [False, True])
def test_elsewhere_one_after_the_other(lengths: list[tuple[int, int]], *, has_norms: bool) -> None:
    torch.manual_seed(0)
    norms = make_norms(HEAD_DIM) if has_norms else None
    batch = make_batch(lengths, BLOCK_SIZE)
    pool = make_pool(batch, 2, BLOCK_SIZE, HEAD_DIM)
    cos_sin = torch.randn(200, HEAD_DIM // 2)
    qkv = torch.randn(batch.num_tokens, 8, HEAD_DIM)
    expected_pool, expected_qkv = pool.clone(), qkv.clone()
    q, k, v = expected_qkv.split([4, 2, 2], 1)
    rope_and_store_kv_reference(q, k, v, cos_sin, batch, expected_pool, 1, norms=norms)
    options = {"scale": 0.1, "sliding_window": 20}
    expected = paged_attention_reference(q, expected_pool, 1, batch, **options)
    q, k, v = qkv.split([4, 2, 2], 1)
    actual = rotate_and_attend(q, k, v, cos_sin, batch, pool, 1, norms=norms, **options)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(pool, expected_pool, equal_nan=True)


def test_which_batches_rotate_on_the_way() -> None:
    decodes, prompts = make_batch([(1, 9), (1, 4)], 4), make_batch([(1, 9), (2, 4)], 4)
    q = torch.empty(2, 4, 64)
    assert rotates(q, torch.empty(9, 64), decodes)
    assert not rotates(q, torch.empty(9, 64), prompts)
    # Half a head is left as it is, or a head is no power of two.
    assert not rotates(q, torch.empty(9, 32), decodes)
    for head_dim in (80, 96):
        assert not rotates(torch.empty(2, 4, head_dim), torch.empty(9, head_dim), decodes)


def test_which_prompts_rotate_on_the_way(monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = make_batch([(1, 9), (300, 300)], 16)
    decodes = make_batch([(1, 9), (1, 4)], 16)

    def is_rotated(
        batch: AttentionBatch,
        head_dim: int = 128,
        rotary_dim: int = 128,
        kv_dtype: torch.dtype = torch.bfloat16,
        sliding_window: int | None = None,
    ) -> bool:
        q = torch.empty(batch.num_tokens, 4, head_dim, dtype=torch.bfloat16)
        pool = torch.empty(20, 1, 2, 2, 16, head_dim, dtype=kv_dtype)
        table = torch.empty(300, rotary_dim)
        limits: dict[str, Any] = {"sliding_window": sliding_window, "softcap": None}
        return rotates_prompts(q, table, pool, batch, **limits)

    assert not is_rotated(prompts)
    monkeypatch.setattr(support, "is_hopper", lambda _: True)
    assert is_rotated(prompts)
    assert not is_rotated(decodes)
    # A head of one line of shared memory, or one of which a part is left as it is.
    assert not is_rotated(prompts, 64, 64)
    assert not is_rotated(prompts, 128, 64)
    # The portable kernel attends: there is a window, or too few queries to widen what they see.
    assert not is_rotated(prompts, sliding_window=64)
    assert not is_rotated(prompts, kv_dtype=FP8)
    assert is_rotated(make_batch([(300, 300)], 16), kv_dtype=FP8)
