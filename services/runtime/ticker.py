"""A periodic callback that knows when its own loop was late."""

import asyncio
from collections.abc import Callable


class Ticker:
    """Calls `on_tick(elapsed_s)` about every `interval_s` until stopped.

    `elapsed_s` counts at most two intervals: time in which this loop itself was stalled must not
    be held against peers, whose messages wait in our own sockets meanwhile.
    """

    def __init__(self, interval_s: float, on_tick: Callable[[float], None]) -> None:
        self._interval_s = interval_s
        self._on_tick = on_tick
        self._loop = asyncio.get_running_loop()
        self._last_s = self._loop.time()
        self._timer = self._loop.call_later(interval_s, self._fire)

    def stop(self) -> None:
        self._timer.cancel()

    def _fire(self) -> None:
        now_s = self._loop.time()
        elapsed_s = min(now_s - self._last_s, 2 * self._interval_s)
        self._last_s = now_s
        # Before the callback, which may stop this ticker.
        self._timer = self._loop.call_later(self._interval_s, self._fire)
        self._on_tick(elapsed_s)
