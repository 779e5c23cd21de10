"""Buffers in which scattered blocks travel together."""

from collections.abc import Callable

from kvtransfer.buffer import Buffer


class StagingPool:
    """Hands out buffers, and keeps up to `max_idle` of the usual size for reuse.

    How many are out at once is bounded by the connections' windows, not here.
    """

    def __init__(
        self, allocate: Callable[[int], Buffer], *, buffer_bytes: int, max_idle: int
    ) -> None:
        self._allocate = allocate
        self._buffer_bytes = buffer_bytes
        self._max_idle = max_idle
        self._idle: list[Buffer] = []

    def take(self, num_bytes: int) -> Buffer:
        """At least `num_bytes`; more than the usual size only where a peer is set up otherwise."""
        if num_bytes > self._buffer_bytes:
            return self._allocate(num_bytes)
        return self._idle.pop() if self._idle else self._allocate(self._buffer_bytes)

    def give_back(self, buffer: Buffer) -> None:
        """The whole buffer that `take` returned, not a slice of it."""
        if len(self._idle) < self._max_idle and buffer.nbytes == self._buffer_bytes:
            self._idle.append(buffer)
