"""How attention of one query a sequence is cut into programs."""

from dataclasses import dataclass, replace

import torch

from kernels.gpu.cards import num_multiprocessors

# Pairs of a sequence and a KV head, up to which programs have several warps.
_ONE_SEQUENCE, _FEW_PAIRS = 8, 64
# Elsewhere than on a GPU: enough that contexts are divided.
_PROGRAMS_IN_INTERPRETER = 5


@dataclass(frozen=True, slots=True)
class DecodeTile:
    """Tokens a program takes at a time, and how it is compiled.

    So many `programs` are on an H100's multiprocessor together, with heads of 128. A context has no
    more pieces than its tiles over `shortest_piece`, rounded up. Who merges parts of a context has
    `merged` elements of them a thread on their way together; more take registers that attention
    wants.
    """

    tokens: int
    num_warps: int
    num_stages: int
    programs: int
    shortest_piece: int = 1
    merged: int = 64


def tile_for(head_dim: int, kv_bytes: int, num_pairs: int) -> DecodeTile:
    """What measured fastest on an H100 (benchmarks/gpu/decode_attention.py), for so many sequences
    and heads. Few warps: each exchange between them, for the maximum, the sum and the weights,
    makes all wait."""
    if head_dim * kv_bytes > 256:
        return DecodeTile(tokens=32, num_warps=4, num_stages=2, programs=4)
    if kv_bytes > 1:
        tile = DecodeTile(tokens=64, num_warps=2, num_stages=2, programs=4, shortest_piece=2)
        several = num_pairs > _ONE_SEQUENCE
        return replace(tile, merged=32) if several else replace(tile, num_warps=4)
    if num_pairs <= _FEW_PAIRS:
        num_warps = 2 if num_pairs > _ONE_SEQUENCE else 4
        return DecodeTile(tokens=64, num_warps=num_warps, num_stages=3, programs=4, merged=128)
    return DecodeTile(tokens=32, num_warps=1, num_stages=3, programs=8)


def programs_at_once(tile: DecodeTile, device: torch.device) -> int:
    """As many as the card holds: with more, the last ones would start when others end."""
    if device.type != "cuda":
        return _PROGRAMS_IN_INTERPRETER
    return tile.programs * num_multiprocessors(device)
