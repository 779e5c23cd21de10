"""Checksums of block runs, for the debug setting that verifies every message."""

import zlib
from collections.abc import Sequence

from kvtransfer.region import Region, Run


def crc32_of(region: Region, runs: Sequence[Run]) -> int:
    """CRC-32 over the runs' bytes, one behind the other."""
    checksum = 0
    for run in runs:
        checksum = zlib.crc32(region.host_bytes(run), checksum)
    return checksum


def checksum_error(region: Region, runs: Sequence[Run], crc32: int | None) -> str | None:
    """What is wrong with what arrived in the runs; None if nothing is."""
    if crc32 is None:
        return "the sender made no checksum; both sides need the same setting"
    if crc32 == crc32_of(region, runs):
        return None
    blocks = ", ".join(f"{first}..{first + count - 1}" for first, count in runs)
    return f"checksum mismatch in blocks {blocks}"
