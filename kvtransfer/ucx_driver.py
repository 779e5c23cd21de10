"""What drives UCX: posted operations, and progress whenever there may be some."""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass

from ucxx import libucxx
from ucxx._lib.arr import Array

from kvtransfer.transport import OnDone

PROGRESS_BUDGET_S = 0.001
"""Longest time that progress keeps the event loop from others."""

PROGRESS_GUARD_S = 0.001
"""While operations are open, progress is made this often even if UCX's descriptor stays silent;
not every transport reports all that it has to do."""

FINISH_BUDGET_S = 0.02
"""Reading a full window takes less; what takes longer waits for the peer."""

LOOK_AHEAD = 4
"""Operations complete nearly in order, and asking one costs as much as a step of progress."""

_ANY_TAG = libucxx.UCXXTag(0)
_NO_BITS = libucxx.UCXXTagMask(0)


@dataclass(eq=False, slots=True)
class Operation:
    """A posted request. UCX holds only the pointer, so the buffer's owner is kept here."""

    request: libucxx.UCXRequest
    array: Array
    on_done: OnDone
    lane: object | None
    """The one that it sends on; None if it receives."""


class Driver:
    """Makes progress when UCX's descriptor is readable or something was posted."""

    def __init__(
        self,
        worker: libucxx.UCXWorker,
        on_probe: Callable[[libucxx.TagProbeResult], None],
        *,
        peers_write: bool,
        spin_s: float,
    ) -> None:
        self.worker = worker
        self._on_probe = on_probe
        self._peers_write = peers_write
        self._spin_s = spin_s
        self._spin_until_s = 0.0
        self._kept: list[Array] = []
        """Memory of failed receives that a peer may still write into."""
        self._operations: list[Operation] = []
        self._loop = asyncio.get_running_loop()
        self._kick: asyncio.Handle | None = None
        self._guard: asyncio.TimerHandle | None = None
        self._descriptor: int = worker.epoll_file_descriptor
        self._loop.add_reader(self._descriptor, self.kick)
        self.kick()

    def kick(self) -> None:
        """Has progress made at the loop's next turn."""
        if self._kick is None:
            self._kick = self._loop.call_soon(self._advance)

    def post(self, operation: Operation) -> None:
        self._operations.append(operation)
        self.kick()

    def finish_receives(self) -> None:
        """Lets receives end that only need this process to go on reading."""
        deadline = time.perf_counter() + FINISH_BUDGET_S
        while any(operation.lane is None for operation in self._operations):
            self.worker.progress_once()
            self._complete(look_ahead=len(self._operations))
            if time.perf_counter() > deadline:
                return

    def end_lane(self, lane: object) -> None:
        """Ends the lane's open sends with an error; UCX never completes those to a dead peer."""
        ended = [operation for operation in self._operations if operation.lane is lane]
        self._operations = [
            operation for operation in self._operations if operation.lane is not lane
        ]
        for operation in ended:
            operation.on_done("the lane was closed")

    def stop(self) -> None:
        self._loop.remove_reader(self._descriptor)
        for handle in (self._kick, self._guard):
            if handle is not None:
                handle.cancel()
        # What is still open are receives; their memory outlives this process's UCX worker.
        self._operations.clear()

    def _advance(self) -> None:
        self._kick = None
        try:
            is_idle = self._make_progress()
        except BaseException:
            # A callback's error is its owner's; the other transfers must not stand still for it.
            self.kick()
            raise
        is_expecting = self._spin_s > 0 and time.perf_counter() < self._spin_until_s
        if not is_idle or is_expecting or not self.worker.arm():
            self.kick()
        elif self._operations and self._guard is None:
            self._guard = self._loop.call_later(PROGRESS_GUARD_S, self._on_guard)

    def _make_progress(self) -> bool:
        """False if there is more to do after the budget."""
        deadline = time.perf_counter() + PROGRESS_BUDGET_S
        while True:
            # One step at a time: `progress()` goes on as long as any peer keeps it busy.
            advanced = self.worker.progress_once()
            advanced |= self._complete(look_ahead=LOOK_AHEAD)
            advanced |= self._take_arrivals()
            if not advanced and not self._complete(look_ahead=len(self._operations)):
                return True
            now_s = time.perf_counter()
            self._spin_until_s = now_s + self._spin_s
            if now_s > deadline:
                return False

    def _on_guard(self) -> None:
        self._guard = None
        self.kick()

    def _complete(self, *, look_ahead: int) -> bool:
        """Ends completed operations, oldest first, until `look_ahead` others were met."""
        completed: list[Operation] = []
        still_open: list[Operation] = []
        for operation in self._operations:
            if operation.request.completed:
                completed.append(operation)
            else:
                still_open.append(operation)
                if len(still_open) > look_ahead:
                    break
        if not completed:
            return False
        num_seen = len(completed) + len(still_open)
        self._operations[:num_seen] = still_open
        for operation in completed:
            error = _error_of(operation.request)
            if error is not None and operation.lane is None and self._peers_write:
                self._kept.append(operation.array)
            operation.on_done(error)
        return True

    def _take_arrivals(self) -> bool:
        any_taken = False
        while (probe := self.worker.tag_probe(_ANY_TAG, _NO_BITS, remove=True)).matched:
            any_taken = True
            self._on_probe(probe)
        return any_taken


def _error_of(request: libucxx.UCXRequest) -> str | None:
    try:
        request.check_error()
    except libucxx.UCXError as error:
        return reason_of(error)
    return None


def reason_of(error: libucxx.UCXError) -> str:
    return str(error) or type(error).__name__
