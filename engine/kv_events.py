"""What changed in a worker's prefix cache since the last look, in the order it happened."""

from collections.abc import Callable

from protocol.block_hash import BlockHash
from protocol.records import BlocksCleared, BlocksRemoved, BlocksStored, KVEvent


class KVEventLog:
    """Collects events until someone drains them.

    Nobody has to: past `max_pending_hashes` the log forgets the single events and answers the
    next drain with `BlocksCleared` and the whole present content, so its size stays bounded.
    """

    def __init__(self, max_pending_hashes: int) -> None:
        self._max_pending_hashes = max_pending_hashes
        self._events: list[KVEvent] = []
        self._num_pending_hashes = 0
        self._has_overflown = False

    def stored(self, parent: BlockHash, block_hash: BlockHash) -> None:
        """A block whose predecessor is `parent` can be hit from now on."""
        if not self._has_room():
            return
        last = self._events[-1] if self._events else None
        if isinstance(last, BlocksStored) and last.hashes[-1] == parent:
            last.hashes.append(block_hash)
        else:
            self._events.append(BlocksStored(parent, [block_hash]))

    def removed(self, block_hash: BlockHash) -> None:
        if not self._has_room():
            return
        last = self._events[-1] if self._events else None
        if isinstance(last, BlocksRemoved):
            last.hashes.append(block_hash)
        else:
            self._events.append(BlocksRemoved([block_hash]))

    def cleared(self) -> None:
        """Everything is gone, so what came before doesn't matter any more."""
        self._start_anew([BlocksCleared()])

    def drain(self, snapshot: Callable[[], list[BlocksStored]]) -> list[KVEvent]:
        """All events since the last drain; `snapshot` yields the content if they overflowed."""
        events: list[KVEvent] = self._events
        if self._has_overflown:
            events = [BlocksCleared()]
            events += snapshot()
        self._start_anew([])
        return events

    def _has_room(self) -> bool:
        if self._has_overflown:
            return False
        self._num_pending_hashes += 1
        if self._num_pending_hashes > self._max_pending_hashes:
            self._has_overflown = True
            self._events = []
            return False
        return True

    def _start_anew(self, events: list[KVEvent]) -> None:
        self._events = events
        self._num_pending_hashes = 0
        self._has_overflown = False
