"""What FlashAttention 3 is given, and for which rows: a stand-in in torch attends for it."""

import importlib
import sys
from dataclasses import replace
from importlib.metadata import version
from typing import Any

import library_stand_in
import pytest
import torch
from attention_cases import attend_naively, make_batch, make_pool
from torch import Tensor

from kernels.attention import AttentionBatch
from kernels.fp8 import FP8
from kernels.rope import rope_and_store_kv_reference

pytest.importorskip("triton")
from kernels.gpu import attention, block_memory, flash_attention
from kernels.gpu.fp8 import saturate_rows
from kernels.gpu.gathered_blocks import gather_blocks
from kernels.gpu.hopper import support

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU has tests of its own"),
    pytest.mark.skipif(
        version("triton") < "3.7", reason="before 3.7, Triton's interpreter fails with NumPy 2.4"
    ),
]
NO_LIMITS: dict[str, Any] = {"sliding_window": None, "softcap": None}
# With whole and begun blocks, a cached prefix, and a sequence much shorter than the longest.
LENGTHS = [(300, 300), (290, 810), (270, 270)]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Those of the library, which is installed."""
    made: list[dict[str, Any]] = []

    def attend(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        made.append({"q": q, **options})
        return library_stand_in.flash_attn_with_kvcache(q, k, v, **options)

    class Library:
        flash_attn_with_kvcache = staticmethod(attend)

    monkeypatch.setattr(flash_attention, "library", lambda: Library)
    # What earlier calls have left behind sequences isn't theirs.
    monkeypatch.setattr(block_memory, "_memories", {})
    empty = torch.empty

    def filled(*shape: Any, **options: Any) -> Tensor:
        made = empty(*shape, **options)
        return made.fill_(255) if made.dtype is torch.uint8 else made  # not a number, in all types

    monkeypatch.setattr(torch, "empty", filled)
    return made


def flash_batch(lengths: list[tuple[int, int]], block_size: int = 16) -> AttentionBatch:
    return replace(make_batch(lengths, block_size), uses_flash_attention=True)


@pytest.mark.parametrize("kv_dtype", [torch.bfloat16, FP8])
@pytest.mark.parametrize(
    ("heads", "head_dim", "block_size"), [((4, 2), 64, 16), ((3, 3), 96, 5), ((8, 1), 128, 32)]
)
def test_gathered_blocks(
    calls: list[dict[str, Any]],
    kv_dtype: torch.dtype,
    heads: tuple[int, int],
    head_dim: int,
    block_size: int,
) -> None:
    torch.manual_seed(0)
    batch = make_batch([(300, 300), (290, 610), (300, 7), (1, 608)], block_size)
    pool = make_pool(batch, heads[1], block_size, head_dim).to(kv_dtype)
    gathered = gather_blocks(pool, 1, batch)
    for i, kv_len in enumerate(batch.kv_lens.tolist()):
        position = torch.arange(kv_len)
        blocks = batch.block_tables[i].long()[position // block_size]
        for kind in (0, 1):
            actual = gathered[kind][i].float()
            expected = pool[blocks, 1, kind, :, position % block_size].float()
            assert torch.equal(actual[:kv_len], expected)
            # Values of weight 0 must be numbers.
            assert not actual[kv_len : kv_len + 256].any()


def test_numbers_beyond_the_range_of_8_bits_become_its_ends() -> None:
    # Rows that lie apart, as queries do among keys and values.
    x = 400 * torch.randn(7, 5, 72).bfloat16()[:, :3]
    actual = saturate_rows(x)
    expected = x.float().clamp(-448, 448)
    assert actual.is_contiguous()
    assert actual.dtype is FP8
    assert actual.float().abs().max() == 448
    # The interpreter doesn't carry into the exponent when it rounds.
    assert (actual != expected.to(FP8)).float().mean() < 0.05


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("heads", [(4, 2), (2, 2), (3, 1)])
@pytest.mark.parametrize(("kv_dtype", "softcap"), [(None, None), (None, 2.0), (FP8, None)])
def test_against_the_reference(
    calls: list[dict[str, Any]],
    head_dim: int,
    heads: tuple[int, int],
    kv_dtype: torch.dtype | None,
    softcap: float | None,
) -> None:
    torch.manual_seed(0)
    batch = flash_batch(LENGTHS)
    pool = make_pool(batch, heads[1], 16, head_dim).to(kv_dtype or torch.bfloat16)
    q = torch.randn(batch.num_tokens, sum(heads), head_dim).bfloat16()[:, : heads[0]]
    options: dict[str, Any] = {"scale": 0.1, "sliding_window": None, "softcap": softcap}
    v_scale = 1.0 if kv_dtype is None else 1.5
    actual = attention.paged_attention(q, pool, 1, batch, v_scale=v_scale, **options)
    assert len(calls) == 1
    queries = q if kv_dtype is None else saturate_rows(q)
    expected = v_scale * attend_naively(queries, pool, 1, batch, **options)
    torch.testing.assert_close(actual.double(), expected, atol=2e-2, rtol=2e-2)
    out = torch.empty_like(actual)
    attention.paged_attention(q, pool, 1, batch, v_scale=v_scale, **options, out=out)
    assert torch.equal(out, actual)


@pytest.mark.parametrize("is_8_bits", [False, True])
def test_decode_rows_have_a_kernel_of_their_own(
    calls: list[dict[str, Any]], *, is_8_bits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Even where Hopper's kernel would take all rows at once.
    monkeypatch.setattr(support, "is_hopper", lambda _: True)
    torch.manual_seed(0)
    batch = flash_batch([(1, 40), *LENGTHS]).divided(1, (40, 810))
    pool = make_pool(batch, 2, 16, 64).to(FP8 if is_8_bits else torch.bfloat16)
    q = torch.randn(batch.num_tokens, 4, 64).bfloat16()
    parts = attention.parts_to_attend(q, pool, batch, **NO_LIMITS)
    assert [part.num_seqs for part in parts] == [1, 3]
    rotates = attention.rotates_prompts(q[1:], torch.empty(900, 64), pool, parts[1], **NO_LIMITS)
    assert rotates == is_8_bits
    if not is_8_bits:
        return  # the interpreter multiplies bfloat16's bits as integers
    actual = attention.paged_attention(q, pool, 1, batch, scale=0.1, v_scale=1.5, **NO_LIMITS)
    (call,) = calls
    assert len(call["q"]) == batch.num_tokens - 1
    queries = torch.cat((q[:1].float(), saturate_rows(q[1:]).float()))
    expected = 1.5 * attend_naively(queries, pool, 1, batch, scale=0.1, **NO_LIMITS)
    torch.testing.assert_close(actual.double(), expected, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("rotary_dim", [128, 32])
def test_queries_are_rotated_and_turned_as_they_are_rounded(
    calls: list[dict[str, Any]], rotary_dim: int
) -> None:
    torch.manual_seed(0)
    batch = flash_batch(LENGTHS)
    pool = make_pool(batch, 2, 16, 128).to(FP8)
    q = 100 * torch.randn(batch.num_tokens, 6, 128).bfloat16()[:, :4]
    angles = torch.randn(900, rotary_dim // 2)
    cos_sin = torch.cat((angles.cos(), angles.sin()), 1)
    rotated = q.float()
    rope_and_store_kv_reference(
        rotated, rotated[:, :2], rotated[:, :2], cos_sin, batch, pool.clone(), 0
    )
    before = q.clone()
    actual = attention.paged_attention(
        q, pool, 1, batch, scale=0.001, v_scale=1.0, **NO_LIMITS, cos_sin=cos_sin
    )
    assert torch.equal(q, before)
    queries = rotated.clamp(-448, 448)
    # The interpreter halves what it should round up to a power of 2, 2 % of all.
    error = (calls[0]["q"].float() - queries).norm() / queries.norm()
    assert error < 0.1
    expected = attend_naively(calls[0]["q"], pool, 1, batch, scale=0.001, **NO_LIMITS)
    torch.testing.assert_close(actual.double(), expected, atol=2e-2, rtol=2e-2)


def is_taken(
    lengths: list[tuple[int, int]],
    *,
    dtype: torch.dtype = torch.bfloat16,
    kv_dtype: torch.dtype | None = None,
    head_dim: int = 128,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_wanted: bool = True,
) -> bool:
    batch = replace(make_batch(lengths, 16), uses_flash_attention=is_wanted)
    q = torch.empty(batch.num_tokens, 4, head_dim, dtype=dtype)
    pool = torch.empty(1, 1, 2, 2, 16, head_dim, dtype=kv_dtype or dtype)
    return flash_attention.is_supported(
        q, pool, batch, sliding_window=sliding_window, softcap=softcap
    )


def test_which_batches_it_takes() -> None:
    long, short = [(256, 256)], [(255, 300)]
    assert is_taken(long)
    assert is_taken(long, kv_dtype=FP8)
    assert is_taken([(500, 600), (12, 12)], head_dim=96)
    assert is_taken(long, softcap=30.0)
    assert not is_taken(long, is_wanted=False)
    assert not is_taken(short)
    assert not is_taken([(1, 300)])
    assert not is_taken(long, sliding_window=64)
    assert not is_taken(long, softcap=30.0, kv_dtype=FP8)
    assert not is_taken(long, dtype=torch.float16)
    assert not is_taken(long, kv_dtype=torch.float8_e5m2)
    assert not is_taken(long, head_dim=80)
    # Copies of so many blocks have no room.
    assert not is_taken([(70_000, 140_000)])


def test_what_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    flash_attention.library.cache_clear()
    with pytest.raises(ImportError, match="flash_attn_interface or fa3_fwd_interface"):
        flash_attention.library()
    monkeypatch.setitem(sys.modules, "fa3_fwd_interface", library_stand_in)
    assert flash_attention.library() is library_stand_in
    flash_attention.library.cache_clear()


def test_a_part_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(name: str) -> None:
        raise ModuleNotFoundError("No module named 'fa3_fwd._C'", name="fa3_fwd._C")

    monkeypatch.setattr(importlib, "import_module", fails)
    flash_attention.library.cache_clear()
    with pytest.raises(ImportError, match=r"fa3_fwd\._C"):
        flash_attention.library()
