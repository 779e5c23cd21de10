"""Hopper's own attention kernel against float64 references, and beside the portable kernel."""

from dataclasses import fields, replace

import pytest
import torch
from attention_cases import FP8_DTYPES, MIXED, check, make_batch, make_pool
from torch import Tensor

from kernels.attention import AttentionBatch, paged_attention
from kernels.gpu.hopper.support import is_supported
from kernels.gpu.prefill_attention import prefill_attention
from kernels.kv_format import KVScales

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9,
    reason="needs a Hopper GPU",
)
# Ends at, before and behind the edges of tiles of 128 tokens, 32 queries and 16-token blocks.
LENGTHS = [*MIXED, (30, 1000), (1, 700), (128, 128), (33, 257), (16, 16), (3, 2048)]


def moved(batch: AttentionBatch) -> AttentionBatch:
    tensors = {field.name: getattr(batch, field.name) for field in fields(batch)}
    tensors = {name: x.cuda() for name, x in tensors.items() if isinstance(x, Tensor)}
    return replace(batch, **tensors)


def attend(q: Tensor, pool: Tensor, layer: int, batch: AttentionBatch, **options) -> Tensor:
    from kernels.gpu.hopper.attention import hopper_attention

    q, pool, batch = q.cuda(), pool.cuda(), moved(batch)
    assert is_supported(
        q, pool, batch, sliding_window=options["sliding_window"], softcap=options["softcap"]
    )
    return hopper_attention(q, pool, layer, batch, scale=options["scale"]).cpu()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("heads", [(4, 2), (8, 1), (9, 3), (4, 4), (14, 2)])
def test_head_groups(dtype: torch.dtype, head_dim: int, heads: tuple[int, int]) -> None:
    check(attend, LENGTHS, heads=heads, head_dim=head_dim, dtype=dtype)


@pytest.mark.parametrize("block_size", [8, 32, 128, 256])
def test_block_sizes(block_size: int) -> None:
    check(attend, LENGTHS, block_size=block_size, head_dim=128, dtype=torch.bfloat16)


def test_many_tiles_a_program_agree_with_the_portable_kernel() -> None:
    """Enough tiles that every program takes several, of sequences of very different lengths."""
    torch.manual_seed(0)
    lengths = [(1, 3000), (2000, 2000), (700, 4100), (1, 1), (1500, 1500), (64, 5000), (3, 130)]
    batch = make_batch(lengths, 16)
    pool = make_pool(batch, 8, 16, 128).bfloat16().cuda()
    q = torch.randn(len(batch.slots), 32, 128).bfloat16().cuda()
    batch = moved(batch)
    options = {"scale": 0.1, "sliding_window": None, "softcap": None}
    from kernels.gpu.hopper.attention import hopper_attention

    expected = prefill_attention(q, pool, 1, batch, **options)
    actual = hopper_attention(q, pool, 1, batch, scale=0.1)
    torch.testing.assert_close(actual, expected, atol=1e-2, rtol=1e-2)
    for _ in range(5):
        assert torch.equal(hopper_attention(q, pool, 1, batch, scale=0.1), actual)


@pytest.mark.parametrize("kv_dtype", FP8_DTYPES)
def test_keys_and_values_of_8_bits_are_widened(kv_dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    batch = make_batch([(600, 600), (1, 700), (700, 2100)], 16)
    pool = (make_pool(batch, 8, 16, 128) * 20).to(kv_dtype).cuda()
    q = torch.randn(len(batch.slots), 32, 128).bfloat16().cuda()
    batch = moved(batch)
    options = {"sliding_window": None, "softcap": None}
    assert is_supported(q, pool, batch, **options)
    scales = KVScales(k=0.05, v=0.5)
    actual = paged_attention(q, pool, 1, batch, scale=0.1, kv_scales=scales)
    expected = prefill_attention(
        q, pool, 1, batch, scale=0.1 * scales.k, v_scale=scales.v, **options
    )
    torch.testing.assert_close(actual, expected, atol=2e-2, rtol=1e-2)


def test_decode_rows_of_8_bits_are_left_to_the_portable_kernel() -> None:
    batch = make_batch([(1, 700), (1, 90), (200, 200)], 16)
    pool = make_pool(batch, 2, 16, 128).to(torch.float8_e4m3fn).cuda()
    q = torch.randn(len(batch.slots), 8, 128).bfloat16().cuda()
    assert not is_supported(q, pool, moved(batch), sliding_window=None, softcap=None)


@pytest.mark.parametrize(
    ("dtype", "head_dim", "block_size", "window", "cap"),
    [
        (torch.float32, 128, 16, None, None),
        (torch.bfloat16, 96, 16, None, None),
        (torch.bfloat16, 128, 5, None, None),
        (torch.bfloat16, 128, 16, 64, None),
        (torch.bfloat16, 128, 16, None, 30.0),
    ],
)
def test_what_it_leaves_to_the_portable_kernel(
    dtype: torch.dtype, head_dim: int, block_size: int, window: int | None, cap: float | None
) -> None:
    q = torch.zeros(4, 8, head_dim, dtype=dtype, device="cuda")
    pool = torch.zeros(2, 1, 2, 2, block_size, head_dim, dtype=dtype, device="cuda")
    batch = moved(make_batch([(4, 4)], block_size))
    assert not is_supported(q, pool, batch, sliding_window=window, softcap=cap)


@pytest.mark.parametrize("kv_dtype", [torch.bfloat16, torch.float8_e4m3fn])
def test_decode_rows_and_prompts_apart(kv_dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    batch = make_batch([(1, 700), (1, 1), (1, 2100), (1, 90), (300, 300), (1100, 1300)], 16)
    pool = make_pool(batch, 8, 16, 128).nan_to_num().to(kv_dtype).cuda()
    q = torch.randn(len(batch.slots), 32, 128).bfloat16().cuda()
    batch = moved(batch)
    scales = KVScales(k=0.9, v=0.5)
    whole = paged_attention(q, pool, 1, batch, scale=0.1, kv_scales=scales)
    divided = batch.divided(4, (2100, 1300))
    apart = paged_attention(q, pool, 1, divided, scale=0.1, kv_scales=scales)
    torch.testing.assert_close(apart, whole, atol=2e-2, rtol=2e-2)
