"""How attention of several queries a sequence is cut into programs."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kernels.attention import AttentionBatch
from kernels.gpu.cards import num_multiprocessors
from kernels.gpu.launching import compiles_ahead
from kernels.kv_format import FP8_DTYPES

MAX_SEQS_IN_PARTS = 64
"""Sequences of a step whose contexts have parts."""
_MAX_PARTS = 8
_MAX_ROWS_IN_PARTS = 64
_PROGRAMS_OF_A_MULTIPROCESSOR = 2


@dataclass(frozen=True, slots=True)
class PrefillTile:
    """Rows and tokens of a tile, and how it is compiled; and how many parts a context has at most,
    of `part_tokens` at least, a multiple of `tokens`."""

    rows: int
    tokens: int
    num_warps: int
    num_stages: int
    parts: int = 1
    part_tokens: int = 1024


def _tile(head_dim: int, element_bytes: int) -> PrefillTile:
    if element_bytes > 2:
        return PrefillTile(rows=32, tokens=32, num_warps=4, num_stages=1)
    if head_dim > 128:
        return PrefillTile(rows=64, tokens=64, num_warps=8, num_stages=2)
    return PrefillTile(rows=128, tokens=64, num_warps=4, num_stages=3)


def _programs_at_once(device: torch.device) -> int:
    """As many as a card holds; elsewhere nobody would gain from more of them."""
    if device.type != "cuda":
        return 0
    return _PROGRAMS_OF_A_MULTIPROCESSOR * num_multiprocessors(device)


def _in_parts(tile: PrefillTile, kv_pool: Tensor, batch: AttentionBatch, group: int) -> PrefillTile:
    """The tile with so many parts that there is work for a card, if it needs any."""
    if batch.num_seqs > MAX_SEQS_IN_PARTS:
        return tile
    # Fewer rows leave registers for what parts need besides.
    rows = min(tile.rows, _MAX_ROWS_IN_PARTS)
    # By tokens: of a padded graph's sequences most have none. Some tokens are padding, too, so
    # parts are rounded.
    num_programs = max(1, batch.num_tokens * group // rows) * kv_pool.shape[3]
    parts = min(_MAX_PARTS, round(_programs_at_once(kv_pool.device) / num_programs))
    return replace(tile, rows=rows, parts=parts) if parts > 1 else tile


def prefill_tiles(
    q: Tensor, kv_pool: Tensor, batch: AttentionBatch, sliding_window: int | None
) -> list[PrefillTile]:
    """The one that this batch is best computed in; ahead of that, of each kind that others want."""
    tile = _tile(q.shape[2], q.element_size())
    if sliding_window is not None or kv_pool.dtype not in FP8_DTYPES:
        return [tile]
    if not compiles_ahead():
        return [_in_parts(tile, kv_pool, batch, q.shape[1] // kv_pool.shape[3])]
    # Parts of many tokens would take memory.
    rows = min(tile.rows, _MAX_ROWS_IN_PARTS)
    return [tile, replace(tile, rows=rows, parts=2)] if len(q) <= rows else [tile]
