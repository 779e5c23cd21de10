"""Which blocks a worker holds, and which changes Redis hasn't got yet."""

from protocol.block_hash import BlockHash
from protocol.records import BlocksCleared, BlocksRemoved, BlocksStored, KVEvent

# Beyond so many waiting hashes the whole set is cheaper, and memory stays bounded.
MAX_WAITING_HASHES = 65536


class BlockInventory:
    """The set after all events, and the events since the last `take_changes` or `start_over`."""

    def __init__(self, max_waiting_hashes: int = MAX_WAITING_HASHES) -> None:
        self._hashes: set[BlockHash] = set()
        self._changes: list[KVEvent] | None = []
        self._num_waiting = 0
        self._max_waiting = max_waiting_hashes

    def __len__(self) -> int:
        return len(self._hashes)

    @property
    def has_changes(self) -> bool:
        return self._num_waiting > 0

    def apply(self, events: list[KVEvent]) -> None:
        for event in events:
            match event:
                case BlocksStored(_, hashes):
                    self._hashes.update(hashes)
                    self._num_waiting += len(hashes)
                case BlocksRemoved(hashes):
                    self._hashes.difference_update(hashes)
                    self._num_waiting += len(hashes)
                case BlocksCleared():
                    self._hashes.clear()
                    self._num_waiting += 1
        if self._num_waiting > self._max_waiting:
            self._changes = None
        if self._changes is not None:
            self._changes.extend(events)

    def take_changes(self) -> list[KVEvent] | None:
        """The events since last time; None if there were too many to keep."""
        changes = self._changes
        if changes is not None:
            self._forget_changes()
        return changes

    def start_over(self) -> list[BlockHash]:
        """All hashes; what was waiting is part of them."""
        self._forget_changes()
        return list(self._hashes)

    def _forget_changes(self) -> None:
        self._changes = []
        self._num_waiting = 0
