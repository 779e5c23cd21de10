"""Hopper's own attention kernel against float64 references, and beside the portable kernel."""

import itertools
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from attention_cases import FP8_DTYPES, MIXED, check, make_batch, make_pool
from torch import Tensor

from kernels.attention import AttentionBatch, paged_attention
from kernels.gpu import attention
from kernels.gpu.hopper.support import is_supported
from kernels.gpu.prefill_attention import prefill_attention
from kernels.kv_format import KVScales
from kernels.rope import rope_and_store_kv
from kernels.rotated_attention import rotate_and_attend
from kernels.turning import turns

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


def make_table(num_rows: int, head_dim: int = 128) -> Tensor:
    angles = 100 * torch.rand(num_rows, head_dim // 2)
    return torch.cat((angles.cos(), angles.sin()), 1).cuda()


def split_heads(qkv: Tensor, heads: tuple[int, int]) -> tuple[Tensor, ...]:
    return qkv.split([heads[0], heads[1], heads[1]], 1)


@pytest.mark.parametrize(
    ("dtype", "heads"),
    [
        *((torch.bfloat16, (group, 1)) for group in (1, 2, 8, 16, 32, 64)),
        *itertools.product((torch.bfloat16, torch.float16), ((9, 3), (8, 2), (14, 2))),
    ],
)
def test_queries_rotated_on_the_way_equal_those_rotated_before(
    dtype: torch.dtype, heads: tuple[int, int]
) -> None:
    """To the bit. The longest sequence ends in the table's last row; every other one has rows of
    its own, behind those of the rest, as those with the long frequencies of LongRoPE have."""
    from kernels.gpu.hopper.attention import hopper_attention

    torch.manual_seed(0)
    batch = make_batch(LENGTHS, 16)
    num_rows = batch.max_kv_len
    counts = batch.query_starts.diff()
    offsets = (num_rows * (torch.arange(len(LENGTHS)) % 2)).repeat_interleave(counts)
    assert int((batch.positions + offsets).max()) == 2 * num_rows - 1
    batch = moved(replace(batch, positions=batch.positions + offsets))
    cos_sin = make_table(2 * num_rows)
    pool = make_pool(batch, heads[1], 16, 128).to("cuda", dtype)
    qkv = torch.randn(batch.num_tokens, heads[0] + 2 * heads[1], 128).to("cuda", dtype)
    q, k, v = split_heads(qkv.clone(), heads)
    rope_and_store_kv(q, k, v, cos_sin, batch, pool, 1)
    expected = hopper_attention(q, pool, 1, batch, scale=0.1)
    before = qkv.clone()
    q = split_heads(qkv, heads)[0]
    actual = hopper_attention(q, pool, 1, batch, scale=0.1, cos_sin=cos_sin)
    assert not expected.isnan().any()
    assert not torch.equal(hopper_attention(q, pool, 1, batch, scale=0.1), expected)
    assert torch.equal(actual, expected)
    assert torch.equal(qkv, before)


def test_many_tiles_a_program_are_each_rotated_once() -> None:
    from kernels.gpu.hopper.attention import hopper_attention

    torch.manual_seed(0)
    lengths = [(2000, 2000), (700, 4100), (2, 2), (1500, 1500), (64, 5000), (33, 130)]
    batch = make_batch(lengths, 16)
    pool = make_pool(batch, 8, 16, 128).bfloat16().cuda()
    qkv = torch.randn(batch.num_tokens, 48, 128).bfloat16().cuda()
    cos_sin, batch = make_table(batch.max_kv_len), moved(batch)
    q, k, v = split_heads(qkv.clone(), (32, 8))
    rope_and_store_kv(q, k, v, cos_sin, batch, pool, 1)
    expected = hopper_attention(q, pool, 1, batch, scale=0.1)
    q = split_heads(qkv, (32, 8))[0]
    for _ in range(10):
        assert torch.equal(
            hopper_attention(q, pool, 1, batch, scale=0.1, cos_sin=cos_sin), expected
        )


@pytest.mark.parametrize("kv_dtype", [torch.bfloat16, torch.float8_e4m3fn])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("is_divided", [False, True])
def test_where_queries_are_rotated_makes_no_difference(
    monkeypatch: pytest.MonkeyPatch, kv_dtype: torch.dtype, head_dim: int, *, is_divided: bool
) -> None:
    """Of a step, with keys and values stored; heads of 64 elements have their own kernel for it.
    Turned keys are turned back where queries are rotated on the way, and rounded then."""
    torch.manual_seed(0)
    num_decodes = 2 if is_divided else 0
    lengths = [*[(1, 700), (1, 90)][:num_decodes], (333, 333), (300, 1300)]
    heads = (14, 2)
    batch = make_batch(lengths, 16)
    pool = make_pool(batch, heads[1], 16, head_dim).nan_to_num().to(kv_dtype).cuda()
    qkv = torch.randn(batch.num_tokens, sum(heads) + heads[1], head_dim).bfloat16().cuda()
    cos_sin, batch = make_table(1300, head_dim), moved(batch)
    limits: dict[str, Any] = {"sliding_window": None, "softcap": None}
    if is_divided:
        batch = batch.divided(num_decodes, (700, 1300), attends_in_parts=True)
    prompts = batch if batch.parts is None else batch.parts[1]
    q = qkv[num_decodes:, : heads[0]]
    is_rotated = attention.rotates_prompts(q, cos_sin, pool, prompts, **limits)
    assert is_rotated == (head_dim == 128)
    found: list[tuple[Tensor, Tensor]] = []
    for rotates in (True, False):
        monkeypatch.setattr(attention, "ROTATES_IN_ATTENTION", rotates)
        q, k, v = split_heads(qkv.clone(), heads)
        target = pool.clone()
        scales = KVScales(k=0.9, v=0.5)
        out = rotate_and_attend(q, k, v, cos_sin, batch, target, 1, scale=0.1, kv_scales=scales)
        found.append((out, target.float()))
    (actual, stored), (expected, expected_stored) = found
    torch.testing.assert_close(actual, expected, atol=2e-2, rtol=2e-2)
    if not (is_rotated and turns(pool, head_dim)):
        assert torch.equal(actual[num_decodes:], expected[num_decodes:])
    # Decode rows' own tokens come from another kernel.
    torch.testing.assert_close(stored, expected_stored, atol=0, rtol=2**-3)
