"""Rope and the KV store against a plain rotation, with fused views and partial rotation."""

import pytest
import torch

from kernels.attention import AttentionBatch
from kernels.kv_format import KVScales
from kernels.norm import HeadNorms
from kernels.rope import rope_and_store_kv, rope_and_store_kv_reference

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}


def make_batch(slots: list[int], positions: list[int]) -> AttentionBatch:
    return AttentionBatch(
        query_starts=torch.tensor([0, len(slots)], dtype=torch.int32),
        kv_lens=torch.tensor([max(positions) + 1], dtype=torch.int32),
        block_tables=torch.zeros(1, 1, dtype=torch.int32),
        slots=torch.tensor(slots),
        positions=torch.tensor(positions),
        max_query_len=len(slots),
        max_kv_len=max(positions) + 1,
        num_seqs=1,
    )


def rotate(x: torch.Tensor, cos_sin: torch.Tensor, positions: list[int]) -> torch.Tensor:
    """Rotate complex numbers made of dimension i and i + rotary_dim / 2."""
    half = cos_sin.shape[1] // 2
    angle = torch.complex(cos_sin[positions, :half].double(), cos_sin[positions, half:].double())
    z = torch.complex(x[..., :half].double(), x[..., half : 2 * half].double()) * angle[:, None]
    return torch.cat((z.real, z.imag, x[..., 2 * half :].double()), -1)


def normalise(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Rounded, as what is rotated then."""
    x64 = x.double()
    return (x64 * (x64.square().mean(-1, keepdim=True) + eps).rsqrt() * weight.double()).to(x.dtype)


@pytest.mark.parametrize("implementation", [rope_and_store_kv, rope_and_store_kv_reference])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("has_norms", [False, True])
@pytest.mark.parametrize(
    ("heads", "head_dim", "rotary_dim", "block_size"),
    [((9, 3), 64, 64, 16), ((2, 2), 80, 32, 5), ((4, 1), 128, 128, 1), ((3, 1), 10, 6, 7)],
)
def test_rope_and_store_kv(
    implementation, dtype, has_norms, heads, head_dim, rotary_dim, block_size
):
    torch.manual_seed(0)
    num_heads, num_kv_heads = heads
    slots = [block_size * 3, 0, block_size * 2 - 1, block_size * 4 + block_size // 2]
    positions = [0, 17, 3, 41]
    angles = torch.outer(torch.arange(50), torch.rand(rotary_dim // 2))
    cos_sin = torch.cat((angles.cos(), angles.sin()), -1)
    fused = torch.randn(4, num_heads + 2 * num_kv_heads, head_dim).to(dtype)
    q, k, v = fused.split((num_heads, num_kv_heads, num_kv_heads), dim=1)
    norms = None
    expected_q, expected_k = q, k
    if has_norms:
        weights = (torch.rand(2, head_dim) + 0.5).to(dtype)
        norms = HeadNorms(weights[0], weights[1], 0.1)
        expected_q, expected_k = normalise(q, norms.q, 0.1), normalise(k, norms.k, 0.1)
    expected_q = rotate(expected_q, cos_sin, positions)
    expected_k = rotate(expected_k, cos_sin, positions)
    key_value = fused[:, num_heads:].clone()
    expected_v = v.clone()
    pool = torch.full((6, 3, 2, num_kv_heads, block_size, head_dim), 9.0, dtype=dtype)
    untouched = pool.clone()

    implementation(q, k, v, cos_sin, make_batch(slots, positions), pool, 1, norms=norms)

    assert torch.equal(fused[:, num_heads:], key_value)
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(q.double(), expected_q, atol=tolerance, rtol=tolerance)
    for i, slot in enumerate(slots):
        stored = pool[slot // block_size, 1, :, :, slot % block_size]
        torch.testing.assert_close(
            stored[0].double(), expected_k[i], atol=tolerance, rtol=tolerance
        )
        assert torch.equal(stored[1], expected_v[i])
        untouched[slot // block_size, 1, :, :, slot % block_size] = stored
    assert torch.equal(pool, untouched)


@pytest.mark.parametrize("implementation", [rope_and_store_kv, rope_and_store_kv_reference])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kv_dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_fp8_pools_round_to_nearest_and_saturate(implementation, dtype, kv_dtype):
    """Every finite value of the type, what lies between two, and what is too large; at angle 0."""
    exact = torch.arange(256, dtype=torch.uint8).view(kv_dtype).float()
    exact = exact[exact.isfinite()].unique()
    values = torch.cat((exact, (exact[1:] + exact[:-1]) / 2, exact.new_tensor([1e30, -1e30])))
    values = torch.cat((values, values.new_tensor([float("nan")]), values * 1.01))
    values = values[: len(values) // 16 * 16].view(-1, 1, 16).to(dtype)
    num_tokens, half = len(values), 8
    cos_sin = torch.cat((torch.ones(1, half), torch.zeros(1, half)), -1)
    batch = make_batch(list(range(num_tokens)), [0] * num_tokens)
    pool = torch.zeros((num_tokens, 1, 2, 1, 1, 16), dtype=kv_dtype)
    scales = KVScales(k=2.0, v=0.5)
    # Rotation would spread NaN.
    keys = values.nan_to_num(0.0)
    implementation(keys.clone(), keys, values, cos_sin, batch, pool, 0, kv_scales=scales)
    largest = torch.finfo(kv_dtype).max
    stored_kv = pool[:, 0, :, 0, 0].unbind(1)
    for x, stored, scale in zip((keys, values), stored_kv, (2.0, 0.5), strict=True):
        expected = (x[:, 0].float() / scale).clamp(-largest, largest).to(kv_dtype)
        is_nan = expected.float().isnan()
        assert torch.equal(stored.float().isnan(), is_nan)
        assert torch.equal(stored.float()[~is_nan], expected.float()[~is_nan])


@pytest.mark.parametrize("implementation", [rope_and_store_kv, rope_and_store_kv_reference])
@pytest.mark.parametrize("norms", [None, HeadNorms(torch.rand(8), torch.rand(8), 1e-6)])
def test_no_queries(implementation, norms):
    """Keys and values are stored as beside queries."""
    torch.manual_seed(0)
    fused = torch.randn(3, 6, 8)
    cos_sin = torch.randn(4, 8)
    batch = make_batch([5, 0, 2], [1, 2, 3])
    q, k, v = fused.split((2, 2, 2), dim=1)
    pools = torch.zeros(2, 2, 1, 2, 2, 4, 8).unbind()
    implementation(q[:, :0], k, v, cos_sin, batch, pools[0], 0, norms=norms)
    implementation(q.clone(), k, v, cos_sin, batch, pools[1], 0, norms=norms)
    assert pools[1].count_nonzero() == 3 * 2 * 2 * 8
    assert torch.equal(*pools)


def test_shapes_that_do_not_fit_are_refused():
    q, k = torch.zeros(1, 2, 8), torch.zeros(1, 1, 8)
    pool = torch.zeros(1, 1, 2, 1, 4, 8)
    batch = make_batch([0], [0])
    with pytest.raises(ValueError, match="don't fit"):
        rope_and_store_kv(q, k, k[..., :4], torch.zeros(4, 8), batch, pool, 0)
    with pytest.raises(ValueError, match="doesn't fit the pool"):
        rope_and_store_kv(q, q, q, torch.zeros(4, 8), batch, pool, 0)
    with pytest.raises(ValueError, match="rotary_dim"):
        rope_and_store_kv(q, k, k, torch.zeros(4, 10), batch, pool, 0)
    norms = HeadNorms(torch.ones(8), torch.ones(4), 1e-6)
    with pytest.raises(ValueError, match="norms"):
        rope_and_store_kv(q, k, k, torch.zeros(4, 8), batch, pool, 0, norms=norms)
