"""Buffers in which scattered blocks travel together."""


class StagingPool:
    """Hands out buffers of one size and keeps up to `max_idle` for reuse.

    How many are out at once is bounded by the connections' windows, not here.
    """

    def __init__(self, *, buffer_bytes: int, max_idle: int) -> None:
        self._buffer_bytes = buffer_bytes
        self._max_idle = max_idle
        self._idle: list[memoryview] = []

    def take(self) -> memoryview:
        return self._idle.pop() if self._idle else memoryview(bytearray(self._buffer_bytes))

    def give_back(self, buffer: memoryview) -> None:
        """The whole buffer that `take` returned, not a slice of it."""
        if len(self._idle) < self._max_idle:
            self._idle.append(buffer)
