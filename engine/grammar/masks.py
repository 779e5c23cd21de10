"""Bits of a mask in memory: token i is bit i % 8 of byte i // 8."""

import ctypes


def write_only(token_ids: tuple[int, ...], address: int, num_bytes: int) -> None:
    """Allows these and no other."""
    ctypes.memset(address, 0, num_bytes)
    allow_also(token_ids, address, num_bytes)


def allow_also(token_ids: tuple[int, ...], address: int, num_bytes: int) -> None:
    mask = (ctypes.c_uint8 * num_bytes).from_address(address)
    for token_id in token_ids:
        mask[token_id // 8] |= 1 << token_id % 8
