"""Triton's attention kernels against plain attention."""

from collections.abc import Callable
from dataclasses import replace
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
from triton_cases import DEVICE, DOT_DTYPES, close, moved, needs_triton

from kernels.attention import AttentionBatch
from kernels.gpu import attention, prefill_tiles, rope
from kernels.gpu.arrivals import arrival_counters
from kernels.gpu.decode_attention import decode_attention
from kernels.gpu.decode_plan import plan_contexts
from kernels.gpu.prefill_attention import prefill_attention
from kernels.gpu.prefill_tiles import PrefillTile
from kernels.kv_format import UNSCALED

pytestmark = needs_triton
FP8_PAIRS = list(product(DOT_DTYPES, FP8_DTYPES))
# All pairs of types with all cases; in the interpreter, which takes a second each time, all pairs
# with the first case, and each other case with a pair of its own.
FP8_GRID = (
    list(product(FP8_PAIRS, FP8_CASES))
    if DEVICE == "cuda"
    else [*product(FP8_PAIRS, FP8_CASES[:1]), *zip(FP8_PAIRS[1:], FP8_CASES[1:], strict=True)]
)
DECODE = [(1, 1), (1, 40), (1, 33), (1, 16), (1, 129), (1, 64)]


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
