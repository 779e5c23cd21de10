"""Sequences in the order in which they're served."""

from bisect import bisect_left, bisect_right, insort
from collections.abc import Callable, Iterator
from typing import Any

from engine.sequence import Sequence


def waiting_rank(sequence: Sequence) -> tuple[int, bool, float]:
    """As `Sequence.rank`, but who was preempted waits in front of its priority."""
    return (sequence.request.priority, sequence.num_preemptions == 0, sequence.arrival_s)


def running_rank(sequence: Sequence) -> tuple[int, float]:
    return sequence.rank


class RankedQueue:
    """A list kept sorted by rank; equal ranks keep the order in which they came.

    A sequence's rank may not change while it's in here.
    """

    def __init__(self, rank: Callable[[Sequence], tuple[Any, ...]]) -> None:
        self._rank = rank
        self._sequences: list[Sequence] = []

    def __len__(self) -> int:
        return len(self._sequences)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._sequences)

    def __getitem__(self, index: int) -> Sequence:
        return self._sequences[index]

    def insert(self, sequence: Sequence) -> None:
        insort(self._sequences, sequence, key=self._rank)

    def remove(self, sequence: Sequence) -> None:
        """Raises ValueError if it isn't here."""
        rank = self._rank(sequence)
        low = bisect_left(self._sequences, rank, key=self._rank)
        high = bisect_right(self._sequences, rank, low, key=self._rank)
        del self._sequences[self._sequences.index(sequence, low, high)]

    def keep(self, wanted: Callable[[Sequence], bool]) -> None:
        """Drops all others, in one pass."""
        self._sequences = [sequence for sequence in self._sequences if wanted(sequence)]
