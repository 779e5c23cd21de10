"""Keys and queries turned for pools of 8 bits: scores stay, and so does what keys are."""

import pytest
import torch

from kernels.attention import AttentionBatch
from kernels.kv_format import FP8_DTYPES, KVScales
from kernels.rope import rope_and_store_kv, rope_and_store_kv_reference
from kernels.turning import turned, turns

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}
NUM_TOKENS, BLOCK_SIZE = 5, 4


def sylvester(size: int) -> torch.Tensor:
    """The Hadamard matrix as it is defined: by whether row and column share an odd number of
    ones."""
    signs = [[(-1) ** (row & column).bit_count() for column in range(size)] for row in range(size)]
    return torch.tensor(signs, dtype=torch.float64) / size**0.5


@pytest.mark.parametrize("head_dim", [32, 64, 128, 256])
def test_halves_of_heads_are_multiplied_with_an_orthogonal_matrix(head_dim: int) -> None:
    torch.manual_seed(0)
    matrix = sylvester(head_dim // 2)
    assert torch.allclose(matrix @ matrix.T, torch.eye(head_dim // 2, dtype=torch.float64))
    x = torch.randn(3, 2, head_dim)
    expected = (x.double().unflatten(-1, (2, -1)) @ matrix).flatten(-2)
    torch.testing.assert_close(turned(x).double(), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(turned(turned(x)), x, atol=1e-5, rtol=0)


def test_which_pools_have_turned_keys() -> None:
    def pool(head_dim: int, dtype: torch.dtype = FP8_DTYPES[0]) -> torch.Tensor:
        return torch.empty(1, 1, 2, 1, 16, head_dim, dtype=dtype)

    assert turns(pool(64), 64)
    assert turns(pool(128, FP8_DTYPES[1]), 128)
    assert not turns(pool(64, torch.bfloat16), 64)
    # Part of a head doesn't rotate; no power of two; less than matrix instructions multiply.
    for head_dim, rotary_dim in ((128, 64), (96, 96), (80, 80), (16, 16)):
        assert not turns(pool(head_dim), rotary_dim)


def rotated(x: torch.Tensor, cos_sin: torch.Tensor) -> torch.Tensor:
    cos, sin = cos_sin[:NUM_TOKENS, None].double().chunk(2, -1)
    first, second = x.double().chunk(2, -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


@pytest.mark.parametrize("implementation", [rope_and_store_kv, rope_and_store_kv_reference])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kv_dtype", FP8_DTYPES)
@pytest.mark.parametrize("head_dim", [32, 64, 128])
def test_scores_stay(
    implementation, dtype: torch.dtype, kv_dtype: torch.dtype, head_dim: int
) -> None:
    torch.manual_seed(0)
    positions = torch.arange(NUM_TOKENS)
    batch = AttentionBatch(
        query_starts=torch.tensor([0, NUM_TOKENS], dtype=torch.int32),
        kv_lens=torch.tensor([NUM_TOKENS], dtype=torch.int32),
        block_tables=torch.tensor([[1, 0]], dtype=torch.int32),
        slots=torch.tensor([4, 5, 6, 7, 0]),
        positions=positions,
        max_query_len=NUM_TOKENS,
        max_kv_len=NUM_TOKENS,
        num_seqs=1,
    )
    angles = torch.outer(positions, torch.rand(head_dim // 2))
    cos_sin = torch.cat((angles.cos(), angles.sin()), -1)
    qkv = torch.randn(NUM_TOKENS, 9, head_dim)
    # One channel much larger than all others, as keys and queries of models have them.
    qkv[:, 6, 3], qkv[:, :6, 3] = 100.0, 10.0
    q, k, v = qkv.to(dtype).split([6, 1, 2], 1)
    k, v = torch.cat((k, k), 1), v.contiguous()
    expected_q, expected_k = rotated(q, cos_sin), rotated(k, cos_sin)
    pool = torch.zeros(2, 2, 2, 2, BLOCK_SIZE, head_dim, dtype=kv_dtype)
    implementation(q, k, v, cos_sin, batch, pool, 1, kv_scales=KVScales(k=0.5, v=0.5))

    torch.testing.assert_close(
        turned(q).double(), expected_q, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype]
    )
    keys = 0.5 * pool[:, 1, 0].double()[batch.slots // BLOCK_SIZE, :, batch.slots % BLOCK_SIZE]
    # The largest error of rounding by itself: half of a last bit, of 3 or 2.
    bound = 2**-4 if kv_dtype is FP8_DTYPES[0] else 2**-3
    close = {"atol": 2**-9, "rtol": bound + TOLERANCE[dtype]}
    torch.testing.assert_close(keys, turned(expected_k).double(), **close)
    scores = torch.einsum("qhd,kd->hqk", expected_q, expected_k[:, 0])
    actual = torch.einsum("qhd,kd->hqk", q.double(), keys[:, 0])
    # Unturned, it would be 0.64 of the bound for e4m3, 0.32 for e5m2.
    assert (actual - scores).norm() < (bound / 4) * scores.norm()
