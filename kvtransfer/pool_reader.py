"""Reads a peer's pool that is mapped into this process; completions come in the event loop.

Most copies take less time than waking a thread, so the loop looks for their end at each turn. The
device may be busy with others' work, though: after a while one thread sleeps until the newest copy
is done, and with it all, as they end in the order in which they were started.
"""

import asyncio
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

from kvtransfer.block_ids import BlockIds

SPIN_S = 0.001


class PoolCopy(Protocol):
    """A copy under way."""

    @property
    def is_done(self) -> bool: ...

    def wait(self) -> None:
        """Until it's done; other threads run meanwhile."""
        ...


class PeerPool(Protocol):
    """A peer's pool as this process sees it; its owner may write into it at any time."""

    @property
    def num_blocks(self) -> int: ...

    def start_copy(self, source_ids: BlockIds, target_ids: BlockIds) -> PoolCopy:
        """From the peer's blocks to our own ones."""
        ...

    def start_trial(self, num_blocks: int) -> PoolCopy:
        """Copies so many of the peer's blocks to nowhere."""
        ...

    def close(self) -> None:
        """Ends the mapping; all copies must be done."""
        ...


class PoolReader:
    """Copies from one peer's pool."""

    def __init__(self, pool: PeerPool) -> None:
        self.num_blocks = pool.num_blocks
        self._pool = pool
        self._loop = asyncio.get_running_loop()
        self._thread = ThreadPoolExecutor(1, "kv-reads")
        self._open: deque[tuple[PoolCopy, Callable[[], None]]] = deque()
        self._is_watching = False
        self._spin_until_s = 0.0

    def read(self, source_ids: BlockIds, target_ids: BlockIds, on_done: Callable[[], None]) -> None:
        """Ids must be within the pools."""
        self._follow(self._pool.start_copy(source_ids, target_ids), on_done)

    def try_out(self, num_blocks: int, on_done: Callable[[], None]) -> None:
        """Reads the peer's first `num_blocks` blocks, or all, and throws them away."""
        self._follow(self._pool.start_trial(min(num_blocks, self.num_blocks)), on_done)

    def close(self) -> None:
        """Ends the mapping, once the copies under way are done: some milliseconds at most."""
        if self._open:
            self._open[-1][0].wait()
        self._finish()
        self._thread.shutdown()
        self._pool.close()

    def _follow(self, copy: PoolCopy, on_done: Callable[[], None]) -> None:
        self._open.append((copy, on_done))
        self._spin_until_s = time.perf_counter() + SPIN_S
        if not self._is_watching:
            self._is_watching = True
            self._loop.call_soon(self._watch)

    def _watch(self) -> None:
        self._finish()
        if not self._open:
            self._is_watching = False
        elif time.perf_counter() < self._spin_until_s:
            self._loop.call_soon(self._watch)
        else:
            waiting = self._loop.run_in_executor(self._thread, self._open[-1][0].wait)
            waiting.add_done_callback(self._on_waited)

    def _on_waited(self, waiting: "asyncio.Future[None]") -> None:
        waiting.result()
        self._watch()

    def _finish(self) -> None:
        while self._open and self._open[0][0].is_done:
            self._open.popleft()[1]()
