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
