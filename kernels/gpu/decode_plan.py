"""Which part of which context each program of decode attention takes.

The card holds so many programs at a time. Each context gets its share of them, by its length, and
at least one for each KV head: it's cut into as many pieces. So a long context among short ones
doesn't hold up a step, and equal ones aren't cut unevenly. Lengths are on the device, where a
replayed graph finds new ones; so this is a kernel, which runs once a step.
"""

# What kernels call is compiled with them, whatever types its decorator has.
# pyright: reportGeneralTypeIssues=false

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.attention import AttentionBatch
from kernels.gpu.decode_tiles import DecodeTile, programs_at_once, tile_for
from kernels.gpu.launching import launch
from kernels.gpu.sizes import ceil_div

# Sequences looked at together.
_SEQS = tl.constexpr(256)
# Of a row: the sequence, -1 if there is no such piece; its first token and the one behind its last;
# the first token that the query sees; the context's first piece, and how many it has; and the new
# token's position and slot, so that they needn't be looked up by who has looked up the sequence.
SEQ, START, END, FIRST_VISIBLE, FIRST_PIECE, NUM_PARTS, POSITION, SLOT = map(tl.constexpr, range(8))
ROW = tl.constexpr(8)
# At least so many shares for each three contexts: one that is half again as long as the mean is
# cut, even where there are more contexts than programs at a time.
_SHARES_OF_THREE = 4


@dataclass(frozen=True, slots=True, eq=False)
class DecodePlan:
    """Pieces of contexts, int32 [num_pieces, ROW], and the tiles in which they are read."""

    pieces: Tensor
    tile: DecodeTile


@triton.jit
def _tiles_of(kv_lens, first_seq, num_seqs, window, TOKENS: tl.constexpr):
    """Of some sequences, the lengths, first visible tokens and tiles from there on. There is at
    least one, so that a padded sequence, which has no context, gets its zeros."""
    seqs = first_seq + tl.arange(0, _SEQS)
    is_seq = seqs < num_seqs
    kv_len = tl.load(kv_lens + seqs, mask=is_seq, other=0)
    first = tl.maximum(kv_len - window, 0)
    num_tiles = tl.maximum(tl.cdiv(kv_len, TOKENS) - first // TOKENS, 1)
    return kv_len, first, tl.where(is_seq, num_tiles, 0)


@triton.jit
def _parts_of(num_tiles, num_in_all, num_shares, shortest):
    parts = tl.minimum(num_tiles * num_shares // num_in_all, tl.cdiv(num_tiles, shortest))
    return tl.where(num_tiles > 0, tl.maximum(parts, 1), 0)


# Compiled once, whatever batches come.
@triton.jit(
    do_not_specialize=["num_seqs", "num_shares", "num_pieces", "window", "shortest"],
    do_not_specialize_on_alignment=["kv_lens", "positions", "slots"],
)
def _plan_kernel(
    kv_lens, positions, slots, pieces, num_seqs, num_shares, num_pieces, window, shortest,
    TOKENS: tl.constexpr,
):  # fmt: skip
    num_in_all = 0
    for first_seq in range(0, num_seqs, _SEQS):
        _, _, num_tiles = _tiles_of(kv_lens, first_seq, num_seqs, window, TOKENS)
        num_in_all += tl.sum(num_tiles, 0)
    # Pieces of divided contexts are the longest ones: they come first, and start first.
    num_of_divided = 0
    for first_seq in range(0, num_seqs, _SEQS):
        _, _, num_tiles = _tiles_of(kv_lens, first_seq, num_seqs, window, TOKENS)
        num_parts = _parts_of(num_tiles, num_in_all, num_shares, shortest)
        num_of_divided += tl.sum(tl.where(num_parts > 1, num_parts, 0), 0)
    next_of_divided = 0
    next_whole = num_of_divided
    for first_seq in range(0, num_seqs, _SEQS):
        kv_len, first, num_tiles = _tiles_of(kv_lens, first_seq, num_seqs, window, TOKENS)
        num_parts = _parts_of(num_tiles, num_in_all, num_shares, shortest)
        of_divided = tl.where(num_parts > 1, num_parts, 0)
        whole = tl.where(num_parts == 1, 1, 0)
        first_piece = tl.where(
            num_parts > 1,
            next_of_divided + tl.cumsum(of_divided, 0) - of_divided,
            next_whole + tl.cumsum(whole, 0) - whole,
        )
        next_of_divided += tl.sum(of_divided, 0)
        next_whole += tl.sum(whole, 0)
        seq = first_seq + tl.arange(0, _SEQS)
        position = tl.load(positions + seq, mask=num_parts > 0, other=0).to(tl.int32)
        slot = tl.load(slots + seq, mask=num_parts > 0, other=0).to(tl.int32)
        first_tile = first // TOKENS
        for part in range(tl.max(num_parts, 0)):
            is_part = part < num_parts
            divisor = tl.maximum(num_parts, 1)
            start = (first_tile + num_tiles * part // divisor) * TOKENS
            end = (first_tile + num_tiles * (part + 1) // divisor) * TOKENS
            row = pieces + (first_piece + part) * ROW
            tl.store(row + SEQ, seq, mask=is_part)
            tl.store(row + START, start, mask=is_part)
            tl.store(row + END, tl.minimum(end, kv_len), mask=is_part)
            tl.store(row + FIRST_VISIBLE, first, mask=is_part)
            tl.store(row + FIRST_PIECE, first_piece, mask=is_part)
            tl.store(row + NUM_PARTS, num_parts, mask=is_part)
            tl.store(row + POSITION, position, mask=is_part)
            tl.store(row + SLOT, slot, mask=is_part)
    for first_piece in range(next_whole, num_pieces, _SEQS):
        piece = first_piece + tl.arange(0, _SEQS)
        tl.store(pieces + piece * ROW + SEQ, -1, mask=piece < num_pieces)


def plan_contexts(
    batch: AttentionBatch,
    kv_pool: Tensor,
    sliding_window: int | None,
    *,
    tile: DecodeTile | None = None,
    num_shares: int | None = None,
) -> DecodePlan:
    """For sequences with one query each. `tile`, and `num_shares` of the card that contexts have
    together, are for tests and benchmarks."""
    num_kv_heads, _, head_dim = kv_pool.shape[3:]
    num_pairs = batch.num_seqs * num_kv_heads
    tile = tile or tile_for(head_dim, kv_pool.element_size(), num_pairs)
    if num_shares is None:
        at_once = programs_at_once(tile, kv_pool.device) // num_kv_heads
        num_shares = max(at_once, ceil_div(_SHARES_OF_THREE * batch.num_seqs, 3))
    num_pieces = num_shares + batch.num_seqs
    pieces = torch.empty((num_pieces, ROW.value), dtype=torch.int32, device=kv_pool.device)
    launch(_plan_kernel, (1,))(
        batch.kv_lens,
        batch.positions,
        batch.slots,
        pieces,
        batch.num_seqs,
        num_shares,
        num_pieces,
        sliding_window or 2**31 - 1,
        tile.shortest_piece,
        TOKENS=tile.tokens,
        num_warps=4,
    )
    return DecodePlan(pieces, tile)
