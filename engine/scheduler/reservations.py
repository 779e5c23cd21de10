"""Blocks that a decode worker sets aside for KV that another worker sends.

1. `try_reserve` matches the cached prefix, allocates the rest: the ticket's blocks.
2. `receive` when the KV is complete: the sequence holds its blocks like any other.
3. Or `cancel`: the cached prefix is given back at once, but the ticket's blocks go to quarantine,
   since the sender may be writing to them; `stop` frees them when it has said that it stopped, or
   its connection is gone.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from engine.block_pool import BlockPool
from engine.phase import PhaseError, PhaseEvent
from engine.scheduler.admission import Admission
from engine.scheduler.progress import advance_computed
from engine.sequence import Sequence


@dataclass(frozen=True, slots=True, eq=False)
class Reservation:
    """Room for the KV of a sequence's first `num_tokens` tokens.

    The first `num_cached_blocks` blocks are here already; block `num_cached_blocks + i` of the
    sequence is to be written to the pool's block `block_ids[i]`. There's at least one to write:
    the cached prefix never covers the last token, so every ticket ends in a transfer and none
    is a special case.
    """

    sequence: Sequence
    num_tokens: int
    num_cached_blocks: int
    block_ids: tuple[int, ...]


class Reservations:
    """All incoming sequences of one decode worker, by what they hold."""

    def __init__(self, pool: BlockPool, admission: Admission) -> None:
        self._pool = pool
        self._admission = admission
        self._reserved: dict[Sequence, Reservation] = {}
        self._num_stopping = 0

    def __len__(self) -> int:
        return len(self._reserved)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._reserved)

    @property
    def num_stopping(self) -> int:
        """Cancelled ones whose blocks are in quarantine."""
        return self._num_stopping

    def try_reserve(self, sequence: Sequence, num_spare_blocks: int) -> Reservation | None:
        """None, with nothing taken, unless `num_spare_blocks` stay available."""
        num_cached = self._admission.take_blocks(sequence, num_spare_blocks)
        if num_cached is None:
            return None
        sequence.advance(PhaseEvent.RESERVE)
        fresh = tuple(sequence.block_ids[num_cached:])
        reservation = Reservation(sequence, sequence.num_tokens, num_cached, fresh)
        self._reserved[sequence] = reservation
        return reservation

    def receive(self, sequence: Sequence) -> None:
        """All its blocks are written; its tokens now go on behind the reserved ones.

        Raises PhaseError if it isn't reserved, ValueError if no token follows the reserved ones.
        """
        reservation = self._reserved.get(sequence)
        if reservation is None:
            raise PhaseError(f"{sequence.key} arrives, but is {sequence.phase.name.lower()}")
        if sequence.num_tokens <= reservation.num_tokens:
            raise ValueError(f"{sequence.key} arrives without its first sampled token")
        sequence.advance(PhaseEvent.ARRIVE)
        del self._reserved[sequence]
        missing = reservation.num_tokens - sequence.num_computed_tokens
        advance_computed(self._pool, sequence, missing)

    def cancel(self, sequence: Sequence) -> Reservation:
        """Quarantines its fresh blocks; give the result to `stop` when writes can't come any more.

        Raises PhaseError for a sequence that isn't reserved.
        """
        sequence.advance(PhaseEvent.CANCEL)
        reservation = self._reserved.pop(sequence)
        self._pool.free(sequence.block_ids[: reservation.num_cached_blocks])
        self._pool.quarantine(reservation.block_ids)
        sequence.block_ids = []
        self._num_stopping += 1
        return reservation

    def stop(self, reservation: Reservation) -> None:
        """The sender has stopped: the blocks are free. Raises PhaseError if not cancelled."""
        reservation.sequence.advance(PhaseEvent.STOP)
        self._num_stopping -= 1
        self._pool.release_quarantine(reservation.block_ids)
