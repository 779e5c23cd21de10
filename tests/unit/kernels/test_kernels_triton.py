"""Triton's kernels against the references: compiled on a GPU, in the interpreter elsewhere."""

from collections.abc import Callable
from dataclasses import fields, replace
from importlib.metadata import version
from itertools import product
from typing import Any

import pytest
import torch
from attention_cases import (
    FP8_CASES,
    FP8_DTYPES,
    MIXED,
    attend_naively,
    check,
    make_batch,
    make_pool,
)
from torch import Tensor

from kernels.activation import silu_and_mul_reference
from kernels.attention import AttentionBatch
from kernels.block_copy import copy_blocks_reference
from kernels.kv_format import UNSCALED, KVScales
from kernels.norm import HeadNorms, add_rms_norm_reference, rms_norm_reference
from kernels.rope import rope_and_store_kv_reference
from kernels.turning import turned

pytest.importorskip("triton")
from kernels.gpu import (
    activation,
    attention,
    block_copy,
    linear,
    norm,
    prefill_tiles,
    rope,
    widened_blocks,
)
from kernels.gpu.arrivals import arrival_counters
from kernels.gpu.block_memory import pays_off
from kernels.gpu.decode_attention import decode_attention
from kernels.gpu.decode_plan import plan_contexts
from kernels.gpu.linear_tiles import LinearTile
from kernels.gpu.prefill_attention import prefill_attention
from kernels.gpu.prefill_tiles import PrefillTile

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() and version("triton") < "3.7",
    reason="before 3.7, Triton's interpreter fails with NumPy 2.4",
)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# The interpreter multiplies bfloat16's bits as integers.
DOT_DTYPES = DTYPES if DEVICE == "cuda" else [torch.float32, torch.float16]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}
FP8_PAIRS = list(product(DOT_DTYPES, FP8_DTYPES))
# All pairs of types with all cases; in the interpreter, which takes a second each time, all pairs
# with the first case, and each other case with a pair of its own.
FP8_GRID = (
    list(product(FP8_PAIRS, FP8_CASES))
    if DEVICE == "cuda"
    else [*product(FP8_PAIRS, FP8_CASES[:1]), *zip(FP8_PAIRS[1:], FP8_CASES[1:], strict=True)]
)
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
DECODE = [(1, 1), (1, 40), (1, 33), (1, 16), (1, 129), (1, 64)]


def moved(batch: AttentionBatch) -> AttentionBatch:
    """The batch with its tensors on the device."""
    tensors = {field.name: getattr(batch, field.name) for field in fields(batch)}
    tensors = {name: x.to(DEVICE) for name, x in tensors.items() if isinstance(x, Tensor)}
    return replace(batch, **tensors)


def on_device(attend: Callable[..., Tensor], **extra: Any) -> Callable[..., Tensor]:
    def run(q: Tensor, pool: Tensor, layer: int, batch: AttentionBatch, **options: Any) -> Tensor:
        scales = options.pop("kv_scales", UNSCALED)
        options |= {"scale": options["scale"] * scales.k, "v_scale": scales.v}
        out = attend(q.to(DEVICE), pool.to(DEVICE), layer, moved(batch), **options, **extra)
        return out.cpu()

    return run


def planned_attention(
    q: Tensor, pool: Tensor, layer: int, batch: AttentionBatch, *, num_shares: int, **options: Any
) -> Tensor:
    plan = plan_contexts(batch, pool, options["sliding_window"], num_shares=num_shares)
    # Attention may not come right behind it.
    plan.pieces.sum()
    return decode_attention(q, pool, layer, batch, plan=plan, **options)


def divided_attention(
    q: Tensor, pool: Tensor, layer: int, batch: AttentionBatch, **options: Any
) -> Tensor:
    """Decode rows in front and prompts behind them, each by its own kernel."""
    lens = batch.kv_lens.tolist()
    num_decodes = len(DECODE)
    batch = batch.divided(num_decodes, (max(lens[:num_decodes]), max(lens[num_decodes:])))
    return attention.paged_attention(q, pool, layer, batch, **options)


SMALL_TILE = PrefillTile(rows=16, tokens=16, num_warps=1, num_stages=1)
IN_PARTS = replace(SMALL_TILE, parts=3, part_tokens=32)
KERNELS = [
    pytest.param(on_device(decode_attention), DECODE, id="decode"),
    pytest.param(on_device(planned_attention, num_shares=1), DECODE, id="decode-undivided"),
    pytest.param(on_device(planned_attention, num_shares=40), DECODE, id="decode-divided"),
    pytest.param(on_device(prefill_attention), MIXED, id="prefill"),
    pytest.param(on_device(prefill_attention, tile=IN_PARTS), MIXED, id="prefill-in-parts"),
    pytest.param(
        on_device(divided_attention), [*DECODE, (7, 7), (20, 50), (64, 129)], id="divided"
    ),
]


def close(actual: Tensor, expected: Tensor, *, num_roundings: int = 1) -> None:
    # The interpreter cuts bfloat16's bits off where a GPU rounds.
    tolerance = TOLERANCE[expected.dtype] * (1 if DEVICE == "cuda" else num_roundings)
    torch.testing.assert_close(actual.cpu(), expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize(("attend", "lengths"), KERNELS)
class TestAttention:
    @pytest.mark.parametrize("dtype", DOT_DTYPES)
    def test_dtypes(self, attend, lengths, dtype):
        check(attend, lengths, dtype=dtype)

    @pytest.mark.parametrize("heads", [(9, 3), (4, 4), (8, 1), (14, 2)])
    def test_head_groups(self, attend, lengths, heads):
        check(attend, lengths, heads=heads)

    @pytest.mark.parametrize("head_dim", [80, 96, 128, 256])
    def test_head_dims(self, attend, lengths, head_dim):
        check(attend, lengths, head_dim=head_dim)

    @pytest.mark.parametrize("block_size", [1, 5, 128])
    def test_block_sizes(self, attend, lengths, block_size):
        check(attend, lengths, block_size=block_size)

    @pytest.mark.parametrize("sliding_window", [1, 5, 64, 1000])
    def test_sliding_windows(self, attend, lengths, sliding_window):
        check(attend, lengths, sliding_window=sliding_window)

    def test_softcap(self, attend, lengths):
        check(attend, lengths, softcap=2.0)

    @pytest.mark.parametrize(("pair", "case"), FP8_GRID, ids=str)
    def test_fp8_pools(self, attend, lengths, pair, case):
        dtype, kv_dtype = pair
        check(attend, lengths, dtype=dtype, kv_dtype=kv_dtype, **case)

    def test_a_long_context(self, attend, lengths):
        check(attend, [(1, 700), *lengths[1:]], heads=(2, 1))


def test_padded_decode_rows_get_zeros_and_store_nothing() -> None:
    batch = make_batch([(1, 20), (1, 5)], 16)
    pool = make_pool(batch, 2, 16, 64).to(DEVICE)
    padded = replace(
        moved(batch),
        kv_lens=torch.tensor([20, 0], dtype=torch.int32, device=DEVICE),
        slots=torch.tensor([int(batch.slots[0]), -1], device=DEVICE),
    )
    q, k, v = (torch.randn(2, heads, 64, device=DEVICE) for heads in (4, 2, 2))
    before = pool.clone()
    rope.rope_and_store_kv(q, k, v, torch.ones(64, 64, device=DEVICE), padded, pool, 0)
    block, offset = divmod(int(batch.slots[0]), 16)
    assert torch.equal(pool[block, 0, 1, :, offset], v[0])
    pool[block, 0, :, :, offset] = before[block, 0, :, :, offset]
    assert torch.equal(pool.nan_to_num(7.0), before.nan_to_num(7.0))
    options = {"scale": 0.125, "sliding_window": None, "softcap": None}
    out = decode_attention(q, pool, 0, padded, **options)
    assert torch.equal(out[1], torch.zeros_like(out[1]))
    assert out[0].abs().sum() > 0


@pytest.mark.parametrize("num_shares", [2, 9, 17, 64])
@pytest.mark.parametrize("sliding_window", [None, 70])
def test_contexts_in_parts(num_shares: int, sliding_window: int | None) -> None:
    torch.manual_seed(0)
    batch = make_batch([(1, 700), (1, 5), (1, 64), (1, 1)], 16)
    pool = make_pool(batch, 3, 16, 80).to(DEVICE)
    kv_lens = torch.tensor([700, 5, 64, 0], dtype=torch.int32, device=DEVICE)
    batch = replace(moved(batch), kv_lens=kv_lens)
    q = torch.randn(4, 9, 80, device=DEVICE)
    options: dict[str, Any] = {"scale": 0.1, "sliding_window": sliding_window, "softcap": None}
    whole = planned_attention(q, pool, 1, batch, num_shares=1, **options)
    options |= {"num_shares": num_shares}
    first = planned_attention(q, pool, 1, batch, **options)
    close(first, whole.cpu())
    assert torch.equal(first[3], torch.zeros_like(first[3]))
    # Counters are as they were, and in which order programs end makes no difference.
    assert not arrival_counters(12, q.device).any()
    for _ in range(3):
        assert torch.equal(planned_attention(q, pool, 1, batch, **options), first)


def test_prompts_over_contexts_in_parts() -> None:
    """A padded graph's sequences without tokens among them."""
    torch.manual_seed(0)
    batch = make_batch([(9, 300), (20, 70), (33, 33)], 16)
    pool = make_pool(batch, 2, 16, 80).to(DEVICE)
    q = torch.randn(batch.num_tokens + 5, 6, 80, device=DEVICE)
    starts = torch.cat((batch.query_starts, batch.query_starts[-1:].expand(2)))
    padded = replace(
        moved(batch),
        query_starts=starts.to(DEVICE),
        kv_lens=torch.tensor([300, 70, 33, 0, 0], dtype=torch.int32, device=DEVICE),
        block_tables=torch.nn.functional.pad(batch.block_tables, (0, 0, 0, 2)).to(DEVICE),
        num_seqs=5,
    )
    options: dict[str, Any] = {"scale": 0.1, "sliding_window": None, "softcap": None}
    whole = prefill_attention(q, pool, 1, padded, tile=SMALL_TILE, **options)
    num_tokens = batch.num_tokens
    for parts in (2, 5, 8):
        tile = replace(IN_PARTS, parts=parts)
        first = prefill_attention(q, pool, 1, padded, tile=tile, **options)
        close(first[:num_tokens], whole[:num_tokens].cpu())
        assert not arrival_counters(128, q.device).any()
        again = prefill_attention(q, pool, 1, padded, tile=tile, **options)
        assert torch.equal(again[:num_tokens], first[:num_tokens])


def test_few_queries_over_long_contexts(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the tiles that steps have, on a card of whatever size."""
    torch.manual_seed(0)
    lengths = [(64, 8000), (3, 5000), (30, 1000), (2, 2100)]
    if DEVICE != "cuda":
        lengths = [(20, 1500), (3, 1100), (9, 100)]
        monkeypatch.setattr(prefill_tiles, "_programs_at_once", lambda _: 6)
    seen: list[PrefillTile] = []
    in_parts = prefill_tiles._in_parts

    def recorded(*arguments: Any) -> PrefillTile:
        seen.append(in_parts(*arguments))
        return seen[-1]

    monkeypatch.setattr(prefill_tiles, "_in_parts", recorded)
    batch = make_batch(lengths, 16)
    pool = make_pool(batch, 2, 16, 128).to(torch.float8_e4m3fn)
    dtype = torch.bfloat16 if torch.bfloat16 in DOT_DTYPES else torch.float16
    q = torch.randn(batch.num_tokens, 8, 128).to(dtype)
    options: dict[str, Any] = {"scale": 0.09, "sliding_window": None, "softcap": None}
    expected = attend_naively(q, pool, 1, batch, **options)
    attend = on_device(prefill_attention)
    first = attend(q, pool, 1, batch, **options)
    assert seen[0].parts > 1
    torch.testing.assert_close(first.double(), expected, atol=2e-2, rtol=2e-2)
    for _ in range(50 if DEVICE == "cuda" else 1):
        assert torch.equal(attend(q, pool, 1, batch, **options), first)
    assert not arrival_counters(1, torch.device(DEVICE)).any()


def test_more_sequences_than_are_looked_at_together() -> None:
    torch.manual_seed(0)
    lengths = [1 + (37 * i) % 50 for i in range(300)]
    batch = make_batch([(1, length) for length in lengths], 16)
    pool, q = make_pool(batch, 1, 16, 64), torch.randn(300, 2, 64)
    options: dict[str, Any] = {"scale": 0.1, "sliding_window": None, "softcap": None}
    expected = attend_naively(q, pool, 1, batch, **options)
    actual = on_device(planned_attention, num_shares=400)(q, pool, 1, batch, **options)
    close(actual, expected.float())


def test_counters_have_one_address() -> None:
    device = torch.device(DEVICE, 0) if DEVICE == "cuda" else torch.device(DEVICE)
    first = arrival_counters(8, device)
    assert arrival_counters(5000, device).data_ptr() == first.data_ptr()
    with pytest.raises(ValueError, match="counters of arrivals"):
        arrival_counters(len(first) + 1, device)


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


@pytest.mark.parametrize("block_bytes", [16, 48, 1040, 4096 * 4, 4096 * 4 + 16])
def test_copy_blocks(block_bytes):
    source = torch.randint(0, 256, (7, block_bytes), dtype=torch.uint8)
    expected = torch.zeros(9, block_bytes, dtype=torch.uint8)
    target = expected.to(DEVICE)
    ids = torch.tensor([[6, 0, 3, 2], [8, 5, 0, 1]], dtype=torch.int32)
    copy_blocks_reference(source, ids[0], expected, ids[1])
    block_copy.copy_blocks(source.to(DEVICE), ids[0].to(DEVICE), target, ids[1].to(DEVICE))
    assert torch.equal(target.cpu(), expected)
