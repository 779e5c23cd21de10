"""Threads of a modelled Gluon program, its barriers, and who knows of whom.

Each thread has a clock: how far it knows every other to be. Arriving at a barrier leaves one's
clock there, waiting for it takes along those of all who arrived.
"""

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

# Threads and barriers of one program.
MAX_CLOCKS = 48
# One thread runs at a time, until it waits or gives its turn: torch's many small operations take
# Python's lock from each other for longer than they last.
_TURN = threading.RLock()
_thread = threading.local()
# Some thread of the kernel that runs has.
_failed = threading.Event()
# How long threads look out for what another program does.
PATIENCE_S = 60.0


class AnotherFailedError(AssertionError):
    """What ends threads that look out for one that has failed."""


class Program:
    """Threads that wait for each other; for other programs' they look out, in turns."""

    def __init__(self, number: int, num_programs: int) -> None:
        self.number, self.num_programs = number, num_programs
        # Up to when each thread's stores are fenced.
        self.fenced = torch.zeros(MAX_CLOCKS, dtype=torch.int32)
        self.checks_at_end: list[Callable[[], None]] = []
        self._changed = threading.Condition(_TURN)
        self._num_clocks = 0
        self._num_running = 1
        self._awaited: list[Callable[[], Any]] = []
        self._is_stopped = False

    def new_clock(self) -> int:
        self._num_clocks += 1
        assert self._num_clocks <= MAX_CLOCKS
        return self._num_clocks - 1

    def new_thread(self, clock: Tensor) -> "Thread":
        own = self.new_clock()
        clock = clock.clone()
        clock[own] = 1
        return Thread(self, own, clock)

    def specialize(self, functions: Sequence[Callable[[], None]]) -> None:
        """What runs here waits for all of `functions`."""
        self._num_running += len(functions) - 1
        run([(self.new_thread(this_thread().clock), function) for function in functions])
        self._num_running += 1
        for check in self.checks_at_end:
            check()

    def wait_for(self, is_over: Callable[[], Any]) -> None:
        self._awaited.append(is_over)
        self._stop_if_stuck()
        self._changed.wait_for(lambda: self._is_stopped or is_over())
        self._awaited.remove(is_over)
        assert is_over(), "all threads that go on wait for barriers, in vain"

    def notify(self) -> None:
        self._changed.notify_all()

    def leave(self) -> None:
        self._num_running -= 1
        self._stop_if_stuck()

    def stop(self) -> None:
        self._is_stopped = True
        self.notify()

    def _stop_if_stuck(self) -> None:
        if len(self._awaited) == self._num_running and not any(f() for f in self._awaited):
            self.stop()


@dataclass(frozen=True, eq=False)
class Thread:
    program: Program
    own: int
    clock: Tensor
    # Products under way, oldest first.
    products: list[Callable[[], None]] = field(default_factory=list)

    @property
    def now(self) -> Tensor:
        return self.clock[self.own]

    def knows(self, times: Tensor) -> bool:
        """Of all that was noted as [clocks, lines]."""
        return bool((times <= self.clock[:, None]).all())


def this_thread() -> Thread:
    return _thread.current


def fence() -> None:
    thread = this_thread()
    thread.program.fenced[thread.own] = thread.now
    thread.clock[thread.own] += 1


def give_turn() -> None:
    """For a short while: who is woken runs on as soon as nobody else does. Ends threads that look
    out for one that has failed."""
    threading.Condition(_TURN).wait(1e-4)
    if _failed.is_set():
        raise AnotherFailedError
    assert time.monotonic() < _thread.looks_out_until, "a program looks out for another in vain"


def run(functions: Sequence[tuple[Thread, Callable[[], None]]]) -> None:
    """All in turns; raises the first failure. Of several programs, the first that isn't another's:
    which of them ends first is chance."""
    has_programs = not hasattr(_thread, "current")
    left: list[Thread] = [thread for thread, _ in functions]
    failures: list[BaseException] = []
    is_done = threading.Condition(_TURN)

    def follow(thread: Thread, function: Callable[[], None]) -> None:
        with _TURN:
            _thread.current = thread
            _thread.looks_out_until = time.monotonic() + PATIENCE_S
            try:
                function()
                assert not thread.products, "a product isn't waited for"
            except BaseException as error:  # noqa: BLE001  (raised again by who waits)
                failures.append(error)
                _failed.set()
                # Those who wait for it fail, too, but after it.
                thread.program.stop()
            thread.program.leave()
            left.remove(thread)
            is_done.notify()

    threads = [threading.Thread(target=follow, args=pair) for pair in functions]
    with _TURN:
        for thread in threads:
            thread.start()
        is_done.wait_for(lambda: not left)
    for thread in threads:
        thread.join()
    if has_programs:
        _failed.clear()
        failures.sort(key=lambda failure: isinstance(failure, AnotherFailedError))
    if failures:
        raise failures[0]


class Barrier:
    def __init__(self, program: Program) -> None:
        self.own = program.new_clock()
        self.num_phases = 0
        self._program = program
        self._left = self._bytes = self._count = 0
        # What those know who have arrived so far, and what those learn who wait.
        self._next_clock = self._clock = torch.zeros(MAX_CLOCKS, dtype=torch.int32)

    def init(self, count: int) -> None:
        self._left = self._count = count

    def change(self, arrived: int, num_bytes: int) -> None:
        thread = this_thread()
        self._left -= arrived
        self._bytes += num_bytes
        assert self._left >= 0, "more arrive at a barrier than it counts"
        self._next_clock = torch.maximum(self._next_clock, thread.clock)
        # What this thread does from now on, nobody learns here.
        thread.clock[thread.own] += 1
        if self._left == self._bytes == 0:
            self._left = self._count
            self.num_phases += 1
            self._next_clock[self.own] = self.num_phases
            self._clock = self._next_clock
            self._program.notify()

    def wait(self, phase: int, *, pred: Any = True) -> None:
        if not pred:
            return
        self._program.wait_for(lambda: self.num_phases & 1 != phase)
        clock = this_thread().clock
        torch.maximum(clock, self._clock, out=clock)


@dataclass(frozen=True)
class Barriers:
    parts: Sequence[Barrier]

    def index(self, i: Any) -> Barrier:
        assert i >= 0
        return self.parts[i]
