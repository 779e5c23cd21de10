"""Which piece of which context each program of decode attention gets."""

from dataclasses import replace

import pytest
import torch
from attention_cases import make_batch
from torch import Tensor
from triton_cases import DEVICE, needs_triton

from kernels.gpu import attention
from kernels.gpu.decode_plan import plan_contexts
from kernels.gpu.decode_tiles import DecodeTile

pytestmark = needs_triton
TILE = DecodeTile(tokens=16, num_warps=1, num_stages=1, programs=1)
POOL = torch.empty((2, 1, 2, 4, 16, 64), device=DEVICE)


def pieces_of(
    lengths: list[int], num_shares: int, window: int | None = None, shortest: int = 1
) -> list[tuple[int, ...]]:
    """In order: sequence, start, end, first visible token, first piece, pieces, position, slot."""
    batch = make_batch([(1, max(1, length)) for length in lengths], 16)
    kv_lens = torch.tensor(lengths, dtype=torch.int32, device=DEVICE)
    positions, slots = torch.arange(2 * len(lengths)).to(DEVICE).view(2, -1) + 5
    batch = replace(batch, kv_lens=kv_lens, positions=positions, slots=slots - len(lengths))
    tile = replace(TILE, shortest_piece=shortest)
    pieces: Tensor = plan_contexts(batch, POOL, window, tile=tile, num_shares=num_shares).pieces
    assert len(pieces) == num_shares + len(lengths)
    rows = [tuple(row) for row in pieces.tolist()]
    num = sum(seq >= 0 for seq, *_ in rows)
    assert all(seq < 0 for seq, *_ in rows[num:])
    return rows[:num]


@pytest.mark.parametrize("num_shares", [1, 7, 40, 500])
@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("num_seqs", [1, 5, 256, 300])
def test_each_token_is_in_one_piece(num_shares: int, window: int | None, num_seqs: int) -> None:
    lengths = [(i * 7919) % 1500 for i in range(num_seqs)]
    pieces = pieces_of(lengths, num_shares, window)
    # What is left of parts has room for so many.
    divided = [piece for piece in pieces if piece[5] > 1]
    assert len(divided) <= num_shares
    assert pieces[: len(divided)] == divided
    assert [seq for seq, *_ in pieces if seq == 0] == [0] * pieces_of_seq(pieces, 0)
    for seq, length in enumerate(lengths):
        own = [(at, *piece) for at, piece in enumerate(pieces) if piece[0] == seq]
        first = max(0, length - (window or length))
        at = [start for _, _, start, *_ in own]
        ends = [end for _, _, _, end, *_ in own]
        assert at == [first // 16 * 16, *ends[:-1]]
        assert ends[-1] == length
        for place, _, _, _, visible, first_piece, num_parts, position, slot in own:
            assert (visible, num_parts) == (first, len(own))
            assert position == slot == seq + 5
            assert first_piece <= place < first_piece + num_parts


def pieces_of_seq(pieces: list[tuple[int, ...]], seq: int) -> int:
    return next(piece[5] for piece in pieces if piece[0] == seq)


def test_shares_go_by_length() -> None:
    # A long context gets nearly all, and comes first.
    pieces = pieces_of([160, 160, 16_000, 160], num_shares=32)
    assert [seq for seq, *_ in pieces] == [2] * 31 + [0, 1, 3]
    assert {end - start for _, start, end, *_ in pieces[:31]} == {512, 528}
    # Equal ones, as many each as there is room for.
    assert [seq for seq, *_ in pieces_of([160] * 3, num_shares=10)] == [0] * 3 + [1] * 3 + [2] * 3
    # More contexts than programs: none is cut.
    assert [piece[:3] for piece in pieces_of([160] * 12, num_shares=10)] == [
        (seq, 0, 160) for seq in range(12)
    ]


def test_short_contexts_have_few_pieces() -> None:
    assert len(pieces_of([160], num_shares=10)) == 10
    pieces = pieces_of([160], num_shares=10, shortest=3)
    assert [end - start for _, start, end, *_ in pieces] == [32, 48, 32, 48]
    assert len(pieces_of([48], num_shares=10, shortest=3)) == 1


def test_padded_sequences_have_an_empty_piece() -> None:
    pieces = pieces_of([0, 20], num_shares=1)
    assert [piece[:6] for piece in pieces] == [(0, 0, 0, 0, 0, 1), (1, 0, 20, 0, 1, 1)]


def test_more_contexts_than_programs_at_a_time() -> None:
    """One that is half again as long as the mean is cut nevertheless."""
    num_seqs = 64
    kv_lens = torch.tensor([160] * (num_seqs - 1) + [240], dtype=torch.int32, device=DEVICE)
    zeros = torch.zeros(num_seqs, dtype=torch.int64, device=DEVICE)
    batch = make_batch([(1, 240)] * num_seqs, 16)
    batch = replace(batch, kv_lens=kv_lens, positions=zeros, slots=zeros)
    pieces = plan_contexts(batch, POOL, None, tile=TILE).pieces.tolist()
    assert [row[0] for row in pieces if row[0] >= 0] == [63, 63, *range(63)]


def test_made_once_for_each_window_of_those_with_one_query() -> None:
    batch = make_batch([(1, 9), (1, 4), (3, 7)], 16)
    attention.prepare(batch, POOL, [None])
    assert not batch.decode_plans
    divided = batch.divided(2, (9, 7))
    attention.prepare(divided, POOL, [None, 64, None])
    assert divided.parts is not None
    decodes, prompts = divided.parts
    assert set(decodes.decode_plans) == {None, 64}
    assert not divided.decode_plans
    assert not prompts.decode_plans
    before = dict(decodes.decode_plans)
    attention.prepare(divided, POOL, [64])
    assert decodes.decode_plans == before
    # Others' geometry is others' plan.
    assert not replace(decodes, num_seqs=1).decode_plans
