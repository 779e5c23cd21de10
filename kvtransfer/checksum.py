"""Checksums of block runs, for the debug setting that verifies every message."""

import zlib
from collections.abc import Sequence

from kvtransfer.region import KVRegion, Run


def crc32_of(region: KVRegion, runs: Sequence[Run]) -> int:
    """CRC-32 over the runs' bytes, one behind the other."""
    checksum = 0
    for run in runs:
        checksum = zlib.crc32(region.view(run), checksum)
    return checksum
