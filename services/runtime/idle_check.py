"""The block pool's books are checked when there is nothing else to do, and for little time."""

import time

from engine.block_pool import BlockPool

# Of all time, at most one part in this many goes into checks: they cost O(num_blocks).
_REST_FACTOR = 100.0


class IdleCheck:
    """Checks `free + referenced + cached + quarantined = total` on an idle engine thread."""

    def __init__(self, pool: BlockPool) -> None:
        self._pool = pool
        self._not_before_s = 0.0

    def run(self) -> None:
        """Raises BlockOwnershipError if the books are wrong: the worker must not go on."""
        started_s = time.monotonic()
        if started_s < self._not_before_s:
            return
        self._pool.check_integrity()
        ended_s = time.monotonic()
        self._not_before_s = ended_s + _REST_FACTOR * (ended_s - started_s)
