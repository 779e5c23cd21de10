"""Calls in forks of this process, for what they leave on disk: Python's lock is one a process."""

import ctypes
import os
import select
import signal
import struct
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import NoReturn

_INDEX = struct.Struct("H")
_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None)


def call_in_forks(
    calls: Sequence[Callable[[], object]], num_forks: int, *, patience_s: float
) -> Iterator[int]:
    """Makes each call once, in one of the forks, and yields its place as soon as it has ended,
    however it did. What it returns or raises is gone.

    Ends before all are through if the forks die, if there can be none, or if none ends a call for
    `patience_s`: they are killed then, as they are with this process. A call must not use the GPU,
    nor what another thread might hold at the fork.
    """
    to_do, put_to_do = os.pipe()
    done, put_done = os.pipe()
    # All at once: a pipe holds 64 KiB.
    os.write(put_to_do, b"".join(_INDEX.pack(place) for place in range(len(calls))))
    os.close(put_to_do)
    forks: list[int] = []
    parent = os.getpid()
    try:
        # With fewer, if there can't be as many.
        with suppress(OSError):
            for _ in range(min(num_forks, len(calls))):
                fork = _fork()
                if fork == 0:
                    _work(calls, to_do, done, put_done, parent)
                forks.append(fork)
        os.close(put_done)
        put_done = -1
        poll = select.poll()
        poll.register(done, select.POLLIN)
        while poll.poll(1000 * patience_s):
            place = os.read(done, _INDEX.size)
            if not place:
                return
            yield _INDEX.unpack(place)[0]
    finally:
        for descriptor in (to_do, done, put_done):
            if descriptor >= 0:
                os.close(descriptor)
        for fork in forks:
            with suppress(ProcessLookupError, ChildProcessError):
                os.kill(fork, signal.SIGKILL)
                os.waitpid(fork, 0)


def _fork() -> int:
    with warnings.catch_warnings():
        # Of other threads, whose locks nobody in the fork waits for.
        warnings.simplefilter("ignore", DeprecationWarning)
        return os.fork()


def _work(
    calls: Sequence[Callable[[], object]], to_do: int, done: int, put_done: int, parent: int
) -> NoReturn:
    """A fork's life: whatever happens in it, it never goes on as its parent."""
    try:
        os.close(done)
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        # The parent may have ended before the kernel knew our wish.
        while os.getppid() == parent and (place := os.read(to_do, _INDEX.size)):
            with suppress(Exception):
                calls[_INDEX.unpack(place)[0]]()
            os.write(put_done, place)
    finally:
        os._exit(0)
