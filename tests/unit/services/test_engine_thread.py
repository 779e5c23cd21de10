"""The engine thread: commands before steps, idle once, failure and stop end it."""

import threading
from collections.abc import Callable

from services.runtime.engine_thread import EngineThread


class Work:
    """Steps as often as it is told to, and writes down what happened."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.steps_left = 0
        self.idled = threading.Event()

    def handle(self, command: int) -> None:
        if command < 0:
            raise ValueError("a negative command")
        self.log.append(f"command {command}")
        self.steps_left += command
        self.idled.clear()

    def step(self) -> bool:
        if not self.steps_left:
            return False
        self.steps_left -= 1
        self.log.append("step")
        return True

    def idle(self) -> None:
        self.log.append("idle")
        self.idled.set()


def _fail(error: Exception) -> None:
    raise AssertionError from error


def _started(work: Work, on_failure: Callable[[Exception], None] = _fail) -> EngineThread[int]:
    thread = EngineThread[int](work, on_failure=on_failure)
    thread.start()
    return thread


def test_commands_queued_before_a_step_are_handled_before_it() -> None:
    work = Work()
    thread = EngineThread[int](work, on_failure=_fail)
    thread.post(1)
    thread.post(2)
    thread.start()
    assert work.idled.wait(10)
    assert thread.stop(10)
    assert work.log == ["command 1", "command 2", "step", "step", "step", "idle"]


def test_it_sleeps_when_idle_and_wakes_for_a_command() -> None:
    work = Work()
    thread = _started(work)
    assert work.idled.wait(10)
    work.idled.clear()
    thread.post(1)
    assert work.idled.wait(10)
    assert thread.stop(10)
    assert work.log == ["idle", "command 1", "step", "idle"]


def test_an_exception_is_reported_and_ends_the_thread() -> None:
    reported: list[Exception] = []
    failed = threading.Event()

    def on_failure(error: Exception) -> None:
        reported.append(error)
        failed.set()

    thread = _started(Work(), on_failure)
    thread.post(-1)
    assert failed.wait(10)
    assert str(reported[0]) == "a negative command"
    assert thread.stop(10)
