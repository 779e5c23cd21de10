"""Hopper's attention of prompts, run on a model of its machine: what is copied where and when, who
waits for whom, and what is seen of it. tests/gpu has it compiled."""

import itertools
from typing import Any

import pytest
import torch
from attention_cases import MIXED, check, make_batch, make_pool
from torch import Tensor

from kernels.attention import AttentionBatch, paged_attention_reference

pytest.importorskip("triton.experimental.gluon")
from gluon_model import change_source, run_modelled

from kernels.gpu.hopper import attending, attention, loading

# Ends at, before and behind the edges of tiles of 32 tokens, 32 queries and 16-token blocks.
LENGTHS = [*MIXED, (30, 100), (33, 33), (3, 96)]
NUM_MULTIPROCESSORS = 3
TOLERANCE = {torch.bfloat16: 8e-3, torch.float16: 1e-3}


@pytest.fixture(autouse=True)
def _modelled(monkeypatch: pytest.MonkeyPatch) -> None:
    run_modelled(monkeypatch, "_hopper_attention_kernel", attention, attending, loading)
    monkeypatch.setattr(attention, "_TOKENS", 32)
    monkeypatch.setattr(attention, "num_multiprocessors", lambda _: NUM_MULTIPROCESSORS)


def attend(q: Tensor, pool: Tensor, layer: int, batch: AttentionBatch, **options: Any) -> Tensor:
    out = torch.full(q.shape, torch.nan, dtype=q.dtype)
    scale = options["scale"]
    actual = attention.hopper_attention(q, pool, layer, batch, scale=scale, out=out)
    assert actual is out
    expected = paged_attention_reference(q.float(), pool.float(), layer, batch, scale=scale)
    tolerance = TOLERANCE[q.dtype]
    torch.testing.assert_close(actual.float(), expected, atol=tolerance, rtol=tolerance)
    return actual


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("heads", [(4, 1), (6, 2), (2, 2)])
def test_head_groups(dtype: torch.dtype, head_dim: int, heads: tuple[int, int]) -> None:
    check(attend, LENGTHS, heads=heads, head_dim=head_dim, dtype=dtype)


@pytest.mark.parametrize("block_size", [8, 64])
def test_block_sizes(block_size: int) -> None:
    check(attend, LENGTHS, block_size=block_size, dtype=torch.bfloat16)


@pytest.mark.parametrize("heads", [(4, 1), (8, 2)])
def test_long_contexts_take_one_head_after_the_other(
    monkeypatch: pytest.MonkeyPatch, heads: tuple[int, int]
) -> None:
    monkeypatch.setattr(attention, "_LONG_CONTEXT", 100)
    assert max(kv_len for _, kv_len in LENGTHS) > 100
    check(attend, LENGTHS, heads=heads, dtype=torch.bfloat16)


@pytest.mark.parametrize("num_multiprocessors", [1, 2, 100])
def test_programs_share_a_counter(
    monkeypatch: pytest.MonkeyPatch, num_multiprocessors: int
) -> None:
    monkeypatch.setattr(attention, "num_multiprocessors", lambda _: num_multiprocessors)
    check(attend, LENGTHS, dtype=torch.float16)


def test_shorter_and_longer_rings(monkeypatch: pytest.MonkeyPatch) -> None:
    for stages, slots in itertools.product((1, 3), (1, 3)):
        monkeypatch.setattr(attention, "_STAGES", stages)
        monkeypatch.setattr(attention, "_SLOTS", slots)
        check(attend, LENGTHS[2:6], dtype=torch.bfloat16)


def test_the_whole_tile_of_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_TOKENS", 128)
    check(attend, [(9, 200), (1, 129), (40, 128)], head_dim=128, dtype=torch.bfloat16)


def test_results_are_scaled() -> None:
    torch.manual_seed(0)
    batch = make_batch([(5, 20)], 16)
    pool, q = make_pool(batch, 1, 16, 64).half(), torch.randn(5, 2, 64).half()
    plain, scaled = (
        attention.hopper_attention(q, pool, 1, batch, scale=0.1, v_scale=v) for v in (1.0, 0.5)
    )
    torch.testing.assert_close(scaled, plain * 0.5)


# Which of two that race is told depends on which was faster.
RACE = "still used|under way|not written yet|product reads|different numbers|another thread stores"
WRONG = "Tensor-likes are not close"
VAIN = "wait for barriers, in vain"
FAULTS = {
    "values are given back before they are multiplied": (
        (attending, "_step", attending),
        """    sums = warpgroup_mma_wait(0, deps=[sums])
    mbarrier.arrive(v_empty.index(before), count=1)""",
        """    mbarrier.arrive(v_empty.index(before), count=1)
    sums = warpgroup_mma_wait(0, deps=[sums])""",
        RACE,
    ),
    "keys aren't waited for": (
        (attending, "_start_scores", attending),
        "mbarrier.wait(full.index(stage), count // STAGES & 1)",
        "pass",
        RACE,
    ),
    "keys are waited for in another phase": (
        (attending, "_start_scores", attending),
        "mbarrier.wait(full.index(stage), count // STAGES & 1)",
        "mbarrier.wait(full.index(stage), count // STAGES & 1 ^ 1)",
        f"{RACE}|{VAIN}",
    ),
    "values aren't waited for": (
        (attending, "_step", attending),
        "mbarrier.wait(v_full.index(before), (count - 1) // STAGES & 1)",
        "pass",
        RACE,
    ),
    "values are cleared before they are there": (
        (attending, "attend", attention),
        """            mbarrier.wait(v_full.index(stage), count // STAGES & 1)
            _zero""",
        "            _zero",
        RACE,
    ),
    "values aren't cleared past the end": (
        (attending, "_zero_past_end", attending),
        "box.store(",
        "str(",
        WRONG,
    ),
    "cleared values aren't fenced": (
        (attending, "_zero_past_end", attending),
        "    fence_async_shared()",
        "",
        "isn't stored and fenced",
    ),
    "warpgroups clear different values": (
        (attending, "attend", attention),
        "_zero_past_end(value_boxes, stage, first, kv_len,",
        "_zero_past_end(value_boxes, stage, first, kv_len - half,",
        RACE,
    ),
    "a sum is used before it is there": (
        (attending, "attend", attention),
        "        sums = warpgroup_mma_wait(0, deps=[sums])\n",
        "",
        f"{RACE}|{WRONG}|isn't waited for",
    ),
    "queries are overwritten": (
        (loading, "load", attention),
        "            mbarrier.wait(q_empty.index(slot), (num_taken // SLOTS & 1) ^ 1)\n",
        "",
        RACE,
    ),
    "the last tile's scalars come late": (
        (loading, "load", attention),
        """    _put_scalar(scalars, slot * NUM_SCALARS + KV_HEAD, -1)
    mbarrier.arrive(q_full.index(slot), count=1)""",
        """    mbarrier.arrive(q_full.index(slot), count=1)
    _put_scalar(scalars, slot * NUM_SCALARS + KV_HEAD, -1)""",
        f"{RACE}|{VAIN}",
    ),
    "a stage is waited for that nobody gives back": (
        (loading, "load", attention),
        "phase = (count // STAGES & 1) ^ 1",
        "phase = count // STAGES & 1",
        VAIN,
    ),
    "too few bytes are expected": (
        (loading, "load", attention),
        "2 * ROWS * HEAD_DIM * ELEMENT_BYTES",
        "ROWS * HEAD_DIM * ELEMENT_BYTES",
        f"{RACE}|{VAIN}",
    ),
    "too many bytes are expected": (
        (loading, "load", attention),
        "2 * ROWS * HEAD_DIM * ELEMENT_BYTES",
        "3 * ROWS * HEAD_DIM * ELEMENT_BYTES",
        VAIN,
    ),
    "blocks past the end are another sequence's": (
        (loading, "_copy_tokens", loading),
        "other=num_blocks",
        "other=0",
        WRONG,
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_model_tells(monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    (module, function, user), old, new, error = FAULTS[fault]
    change_source(monkeypatch, getattr(module, function), old, new, user)
    monkeypatch.setattr(attention, "num_multiprocessors", lambda _: 1)
    with pytest.raises(AssertionError, match=error):
        check(attend, LENGTHS, dtype=torch.float16)


def rotated(q: Tensor, cos_sin: Tensor, positions: Tensor) -> Tensor:
    cos, sin = cos_sin[positions][:, None].chunk(2, -1)
    first, second = q.float().chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(q.dtype)


@pytest.mark.parametrize("heads", [(4, 1), (6, 2), (2, 2)])
def test_queries_are_rotated(heads: tuple[int, int]) -> None:
    torch.manual_seed(0)
    batch = make_batch(LENGTHS, 16)
    pool = make_pool(batch, heads[1], 16, 128).bfloat16()
    q = torch.randn(len(batch.slots), heads[0], 128).bfloat16()
    angles = torch.rand(200, 64) * 6
    cos_sin = torch.cat([angles.cos(), angles.sin()], -1)
    before = q.clone()
    actual = attention.hopper_attention(q, pool, 1, batch, scale=0.1, cos_sin=cos_sin)
    assert torch.equal(q, before)
    expected = attention.hopper_attention(
        rotated(q, cos_sin, batch.positions), pool, 1, batch, scale=0.1
    )
    assert torch.equal(actual, expected)


def test_rotations_are_fenced(monkeypatch: pytest.MonkeyPatch) -> None:
    change_source(monkeypatch, attending._rotate, "    fence_async_shared()", "", attending)
    with pytest.raises(AssertionError, match="isn't stored and fenced"):
        test_queries_are_rotated((4, 1))
