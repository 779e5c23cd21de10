"""Triton's kernels against the references: compiled on a GPU, in the interpreter elsewhere."""

from dataclasses import replace
from itertools import product

import pytest
import torch
from attention_cases import FP8_DTYPES, make_batch
from triton_cases import DEVICE, DOT_DTYPES, DTYPES, close, moved, needs_triton

from kernels.activation import silu_and_mul_reference
from kernels.block_copy import copy_blocks_reference
from kernels.gpu import activation, block_copy, linear, norm, rope, widened_blocks
from kernels.gpu.block_memory import pays_off
from kernels.gpu.linear_tiles import LinearTile
from kernels.kv_format import KVScales
from kernels.norm import HeadNorms, add_rms_norm_reference, rms_norm_reference
from kernels.rope import rope_and_store_kv_reference
from kernels.turning import turned

pytestmark = needs_triton
# Sizes of heads, and of what rotates of them.
ROPE_DIMS = [(64, 40), (64, 64), (96, 96), (96, 32), (128, 128), (128, 64), (256, 256), (256, 64)]
ROPE_PAIRS = list(product(DTYPES, [None, *FP8_DTYPES]))
ROPE_GRID = (
    list(product(ROPE_PAIRS, ROPE_DIMS))
    if DEVICE == "cuda"
    else [
        *product(ROPE_PAIRS, ROPE_DIMS[:1]),
        *product([(torch.bfloat16, None), (torch.float16, FP8_DTYPES[0])], ROPE_DIMS[1:]),
    ]
)


@pytest.mark.parametrize(("types", "dims"), ROPE_GRID, ids=str)
@pytest.mark.parametrize("has_norms", [False, True])
def test_rope_and_store_kv(
    types: tuple[torch.dtype, torch.dtype | None], dims: tuple[int, int], *, has_norms: bool
) -> None:
    torch.manual_seed(0)
    (dtype, kv_dtype), (head_dim, rotary_dim) = types, dims
    scales = KVScales(k=0.002, v=0.5)
    batch = make_batch([(3, 20), (1, 5), (17, 17)], 8)
    heads, kv_heads = 9, 3
    qkv = torch.randn(len(batch.slots), heads + 2 * kv_heads, head_dim).to(dtype)
    cos_sin = torch.randn(64, rotary_dim)
    shape = (int(batch.block_tables.max()) + 1, 2, 2, kv_heads, 8, head_dim)
    pool = torch.zeros(shape, dtype=kv_dtype or dtype)
    actual_qkv, actual_pool = qkv.to(DEVICE, copy=True), pool.to(DEVICE, copy=True)
    sizes = [heads, kv_heads, kv_heads]
    norms, actual_norms = None, None
    if has_norms:
        weights = (torch.rand(2, head_dim) + 0.5).to(dtype)
        norms = HeadNorms(weights[0], weights[1], 0.1)
        actual_norms = HeadNorms(weights[0].to(DEVICE), weights[1].to(DEVICE), 0.1)
    split = qkv.split(sizes, 1)
    options = {"kv_scales": scales, "norms": norms}
    rope_and_store_kv_reference(*split, cos_sin, batch, pool, 1, **options)
    split = actual_qkv.split(sizes, 1)
    options = {"kv_scales": scales, "norms": actual_norms}
    rope.rope_and_store_kv(*split, cos_sin.to(DEVICE), moved(batch), actual_pool, 1, **options)
    close(actual_qkv, qkv, num_roundings=1 + has_norms)
    if kv_dtype is None:
        close(actual_pool, pool, num_roundings=1 + has_norms)
    else:
        assert kv_dtype is torch.float8_e5m2 or pool.float().max() == torch.finfo(kv_dtype).max
        # Sums that lie between two of so few values may fall either way, and the interpreter
        # doesn't carry into the exponent when it rounds.
        share = 1e-3 if DEVICE == "cuda" else 0.02
        assert (actual_pool.cpu().float() != pool.float()).float().mean() < share


@pytest.mark.parametrize("has_norms", [False, True])
def test_heads_of_several_tokens_are_turned_together(
    monkeypatch: pytest.MonkeyPatch, *, has_norms: bool
) -> None:
    """Of 21 tokens, in programs of 8; one has no slot."""
    torch.manual_seed(0)
    heads, kv_heads, head_dim, dtype = 9, 3, 64, torch.float16
    batch = make_batch([(3, 20), (1, 5), (17, 17)], 8)
    batch.slots[4] = -1
    shape = (int(batch.block_tables.max()) + 1, 2, 2, kv_heads, 8, head_dim)
    qkv = torch.randn(21, heads + 2 * kv_heads, head_dim).to(DEVICE, dtype)
    cos_sin = torch.randn(64, head_dim, device=DEVICE)
    norms = None
    if has_norms:
        weights = (torch.rand(2, head_dim) + 0.5).to(DEVICE, dtype)
        norms = HeadNorms(weights[0], weights[1], 0.1)
    made: list[tuple[torch.Tensor, torch.Tensor]] = []
    for many_tokens in (1000, 1):
        monkeypatch.setattr(rope, "_MANY_TOKENS", many_tokens)
        pool = torch.zeros(shape, dtype=FP8_DTYPES[0], device=DEVICE)
        heads_of_tokens = qkv.clone()
        split = heads_of_tokens.split([heads, kv_heads, kv_heads], 1)
        rope.rope_and_store_kv(*split, cos_sin, moved(batch), pool, 1, norms=norms)
        made.append((heads_of_tokens.float(), pool.float()))
    (apart, apart_pool), (together, pool) = made
    assert apart_pool.count_nonzero() > 19 * 2 * kv_heads * head_dim
    torch.testing.assert_close(together, apart, atol=2e-3, rtol=2e-3)
    # Sums of another order may fall to another of so few numbers.
    assert (pool != apart_pool).float().mean() < 1e-3


@pytest.mark.parametrize("kv_dtype", FP8_DTYPES)
@pytest.mark.parametrize("dtype", [dtype for dtype in DTYPES if dtype.itemsize == 2])
def test_widened_blocks(kv_dtype: torch.dtype, dtype: torch.dtype) -> None:
    batch = make_batch([(300, 300), (290, 310), (300, 7)], 16)
    pool = (10 * torch.randn(int(batch.block_tables.max()) + 1, 3, 2, 5, 16, 72)).to(kv_dtype)
    assert pays_off(pool, batch, dtype)
    assert not pays_off(pool, replace(batch, slots=batch.slots[:700]), dtype)
    widened, over = widened_blocks.widen_blocks(pool.to(DEVICE), 1, moved(batch), dtype)
    for i, kv_len in enumerate(batch.kv_lens.tolist()):
        num_blocks = -(-kv_len // 16)
        actual = widened[over.block_tables[i, :num_blocks].long(), 0]
        expected = pool[batch.block_tables[i, :num_blocks].long(), 1].to(dtype)
        # The interpreter is wrong about e5m2's smallest numbers.
        torch.testing.assert_close(actual.cpu(), expected, rtol=0, atol=5e-5)


@pytest.mark.parametrize("dtype", [dtype for dtype in DOT_DTYPES if dtype.itemsize == 2])
@pytest.mark.parametrize(("num_heads", "head_dim"), [(5, 128), (1, 64)])
def test_widened_blocks_turn_keys_back(dtype: torch.dtype, num_heads: int, head_dim: int) -> None:
    """Where keys and values share a tile of the kernel, too."""
    batch = make_batch([(300, 300), (300, 7)], 16)
    num_blocks = int(batch.block_tables.max()) + 1
    pool = (10 * torch.randn(num_blocks, 3, 2, num_heads, 16, head_dim)).to(FP8_DTYPES[0])
    expected = pool[:, 1].float()
    expected[:, 0] = turned(expected[:, 0])
    widened, over = widened_blocks.widen_blocks(
        pool.to(DEVICE), 1, moved(batch), dtype, turns_back=True
    )
    for i, kv_len in enumerate(batch.kv_lens.tolist()):
        num_blocks = -(-kv_len // 16)
        actual = widened[over.block_tables[i, :num_blocks].long(), 0]
        close(actual, expected[batch.block_tables[i, :num_blocks].long()].to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [64, 576, 4096])
def test_norms(dtype: torch.dtype, size: int) -> None:
    torch.manual_seed(0)
    x, residual = torch.randn(2, 5, size).to(dtype)
    weight = torch.randn(size).to(dtype)
    device_weight = weight.to(DEVICE)
    close(norm.rms_norm(x.to(DEVICE), device_weight, 1e-5), rms_norm_reference(x, weight, 1e-5))
    heads = torch.randn(5, 4, size).to(dtype)[:, 1:3]
    expected = rms_norm_reference(heads, weight, 1e-5)
    close(norm.rms_norm(heads.to(DEVICE), device_weight, 1e-5), expected)
    copies = x.to(DEVICE, copy=True), residual.to(DEVICE, copy=True)
    actual = norm.add_rms_norm(*copies, device_weight, 1e-5)
    for found, wanted in zip(
        actual, add_rms_norm_reference(x, residual, weight, 1e-5), strict=True
    ):
        close(found, wanted)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [10, 1536])
def test_silu_and_mul(dtype: torch.dtype, size: int) -> None:
    gate_up = torch.randn(3, 2 * size).to(dtype)
    close(activation.silu_and_mul(gate_up.to(DEVICE)), silu_and_mul_reference(gate_up))


@pytest.mark.parametrize("dtype", [dtype for dtype in DOT_DTYPES if dtype.itemsize == 2])
@pytest.mark.parametrize("num_tokens", [1, 3, 33, 64])
@pytest.mark.parametrize("splits", [None, 1, 4])
@pytest.mark.parametrize(("out_features", "in_features"), [(96, 576), (200, 1100)])
def test_linear(
    dtype: torch.dtype, num_tokens: int, splits: int | None, out_features: int, in_features: int
) -> None:
    torch.manual_seed(0)
    x = torch.randn(num_tokens, in_features).to(dtype)
    weight = (torch.randn(out_features, in_features) * in_features**-0.5).to(dtype)
    bias = torch.randn(out_features).to(dtype)
    expected = (x.double() @ weight.double().T + bias.double()).to(dtype)
    tile = None if splits is None else LinearTile(splits=splits, num_stages=2)
    for _ in range(2):  # the second finds the counters as the first left them
        actual = linear.linear(x.to(DEVICE), weight.to(DEVICE), bias.to(DEVICE), tile=tile)
        close(actual, expected)
    residual = torch.randn(num_tokens, out_features).to(dtype)
    stream = residual.to(DEVICE, copy=True)
    linear.linear(x.to(DEVICE), weight.to(DEVICE), None, residual=stream, tile=tile)
    close(stream, (x.double() @ weight.double().T + residual.double()).to(dtype))


@pytest.mark.parametrize("max_programs", [None, 3])
@pytest.mark.parametrize("block_bytes", [16, 48, 1040, 4096 * 4, 4096 * 4 + 16])
def test_copy_blocks(block_bytes, max_programs):
    source = torch.randint(0, 256, (7, block_bytes), dtype=torch.uint8)
    expected = torch.zeros(9, block_bytes, dtype=torch.uint8)
    target = expected.to(DEVICE)
    ids = torch.tensor([[6, 0, 3, 2], [8, 5, 0, 1]], dtype=torch.int32)
    copy_blocks_reference(source, ids[0], expected, ids[1])
    block_copy.copy_blocks(
        source.to(DEVICE),
        ids[0].to(DEVICE),
        target,
        ids[1].to(DEVICE),
        max_programs=max_programs,
    )
    assert torch.equal(target.cpu(), expected)
