"""The thread that owns a worker's engine: commands come by a queue, steps run while there is work.

The engine, its block pool and its scheduler are touched by this thread alone, so they need no
locks. Kernels release the GIL while they compute; meanwhile the event loop in the main thread
moves messages and KV.
"""

import threading
from collections.abc import Callable
from queue import Empty, SimpleQueue
from typing import Generic, Protocol, TypeVar

CommandT = TypeVar("CommandT")
CommandT_contra = TypeVar("CommandT_contra", contravariant=True)


class EngineWork(Protocol[CommandT_contra]):
    """What a service does on the engine thread."""

    def handle(self, command: CommandT_contra) -> None:
        """Applies one command; never blocks."""
        ...

    def step(self) -> bool:
        """Runs one engine step; False if there was nothing to run."""
        ...

    def idle(self) -> None:
        """Called each time the work ran out, before the thread waits for the next command."""
        ...


class EngineThread(Generic[CommandT]):
    """Runs `work` on a thread of its own until `stop`.

    An exception on the thread is a fault of ours or of the device: `on_failure` gets it (on the
    engine thread) and the thread ends; the process can't serve any more and should exit.
    """

    def __init__(
        self, work: EngineWork[CommandT], *, on_failure: Callable[[Exception], None]
    ) -> None:
        self._work = work
        self._on_failure = on_failure
        self._commands: SimpleQueue[CommandT | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def post(self, command: CommandT) -> None:
        """Queues a command; it is handled before the next step."""
        self._commands.put(command)

    def stop(self, timeout_s: float) -> bool:
        """Ends the thread after its current step; False if that step outlasts `timeout_s`."""
        self._commands.put(None)
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        try:
            while self._take_commands(wait=False):
                if not self._work.step():
                    self._work.idle()
                    if not self._take_commands(wait=True):
                        return
        except Exception as error:  # noqa: BLE001  (the thread's outermost frame)
            self._on_failure(error)

    def _take_commands(self, *, wait: bool) -> bool:
        """Handles all queued commands, at first waiting for one if `wait`; False means stop."""
        try:
            command = self._commands.get(block=wait)
            while command is not None:
                self._work.handle(command)
                command = self._commands.get_nowait()
        except Empty:
            return True
        return False
