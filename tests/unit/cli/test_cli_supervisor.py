"""The supervisor over small real processes."""

import asyncio
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from cli.child import Child, ChildSpec
from cli.supervisor import Service, State, Supervised, Supervisor
from protocol.errors import StartupError


def service(name: str, script: str, *, tier: int = 0, ready_file: Path | None = None) -> Service:
    async def is_ready(pid: int) -> bool:
        return ready_file is not None and _holds(ready_file, str(pid))

    spec = ChildSpec(name, (sys.executable, "-c", textwrap.dedent(script)), dict(os.environ))
    return Service(spec, name, tier, is_ready, stop_timeout_s=10.0)


def _holds(path: Path, text: str) -> bool:
    return path.exists() and path.read_text() == text


def serving(ready_file: Path) -> str:
    """A process that is ready at once and ends at SIGTERM."""
    return f"""
        import os, pathlib, signal
        signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
        pathlib.Path({str(ready_file)!r}).write_text(str(os.getpid()))
        while True:
            signal.pause()
        """


class Changes:
    """Collects what the supervisor says, and lets a test wait for a state."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, State, str]] = []
        self._more = asyncio.Event()

    def __call__(self, one: Supervised, detail: str) -> None:
        self.seen.append((one.name, one.state, detail))
        self._more.set()

    async def wait_for(self, name: str, state: State, *, times: int = 1) -> None:
        async with asyncio.timeout(20):
            while sum(n == name and s is state for n, s, _ in self.seen) < times:
                self._more.clear()
                await self._more.wait()


async def test_all_get_ready_and_end_tier_by_tier(tmp_path):
    changes = Changes()
    services = [
        service(name, serving(tmp_path / name), tier=tier, ready_file=tmp_path / name)
        for name, tier in (("low", 0), ("high", 2), ("middle", 1))
    ]
    supervisor = Supervisor(services, on_change=changes)
    running = asyncio.create_task(supervisor.run())
    await supervisor.wait_ready(timeout_s=20)
    pids = [one.pid for one in supervisor.supervised]
    await supervisor.stop()
    await running
    stopped = [name for name, state, _ in changes.seen if state is State.STOPPED]
    assert stopped == ["high", "middle", "low"]
    assert all(pid is not None and not _is_running(pid) for pid in pids)


async def test_a_crashed_process_is_started_again(tmp_path):
    """At once, and the second time after a pause."""
    changes = Changes()
    path = tmp_path / "ready"
    supervisor = Supervisor([service("worker", serving(path), ready_file=path)], on_change=changes)
    running = asyncio.create_task(supervisor.run())
    await supervisor.wait_ready(timeout_s=20)
    (worker,) = supervisor.supervised
    pids = [worker.pid]
    for times in (2, 3):
        assert pids[-1] is not None
        os.kill(pids[-1], signal.SIGKILL)
        await changes.wait_for("worker", State.READY, times=times)
        pids.append(worker.pid)
    assert worker.num_restarts == 2
    assert len(set(pids)) == 3
    first, second = (detail for _, state, detail in changes.seen if state is State.RESTARTING)
    assert first == "ended (SIGKILL); starting it again"
    assert second == "ended (SIGKILL); starting it again in 0.5 s"
    await supervisor.stop()
    await running


async def test_one_that_cannot_start_fails_the_stack_with_its_own_words(tmp_path):
    path = tmp_path / "ready"
    failing = "import sys; sys.exit('tandem: The model is missing.')"
    services = [service("good", serving(path), ready_file=path), service("bad", failing)]
    supervisor = Supervisor(services, on_change=Changes())
    with pytest.raises(StartupError, match=r"^bad can't start: The model is missing\.$"):
        await supervisor.run()
    assert not any(one.pid for one in supervisor.supervised)


async def test_those_that_are_not_ready_in_time_are_named(tmp_path):
    path = tmp_path / "never-written"
    supervisor = Supervisor(
        [service("slow", "import signal; signal.pause()", ready_file=path)], on_change=Changes()
    )
    running = asyncio.create_task(supervisor.run())
    with pytest.raises(StartupError, match=r"slow didn't get ready within 0\.2 s"):
        await supervisor.wait_ready(timeout_s=0.2)
    supervisor.kill()
    await running


@pytest.mark.parametrize("kill", [True, False])
async def test_one_that_is_stopped_while_it_starts(tmp_path, kill):
    path = tmp_path / "never-written"
    supervisor = Supervisor(
        [service("slow", "import signal; signal.pause()", ready_file=path)], on_change=Changes()
    )
    running = asyncio.create_task(supervisor.run())
    # The process is being started, and nobody has its id yet.
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert supervisor.supervised[0].child is None
    if kill:
        supervisor.kill()
    else:
        await supervisor.stop()
    async with asyncio.timeout(20):
        await running
    assert supervisor.supervised[0].pid is None


async def test_output_carries_the_name_of_its_process(capfdbinary):
    script = "import sys; print('one'); print('two', end=''); sys.exit('tandem: bye')"
    child = await Child.start(
        ChildSpec("a", (sys.executable, "-c", script), dict(os.environ), label="a | ")
    )
    assert await child.wait() == 1
    assert capfdbinary.readouterr().out == b"a | one\na | two\n"
    assert child.last_words == "bye"


def test_children_end_with_a_killed_parent():
    parent = subprocess.Popen([sys.executable, "-c", _PARENT], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child_pid = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    parent.stdout.close()
    _wait_until_gone(child_pid)


def _wait_until_gone(pid: int) -> None:
    deadline_s = time.monotonic() + 10
    while _is_running(pid):
        assert time.monotonic() < deadline_s, f"process {pid} outlived its parent"
        time.sleep(0.01)


def _is_running(pid: int) -> bool:
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    # An orphan may stay a zombie where nobody reaps.
    return status.rpartition(")")[2].split()[0] != "Z"


_PARENT = """
import asyncio, os, sys
from cli.child import Child, ChildSpec

async def main():
    argv = (sys.executable, "-c", "import signal; signal.pause()")
    child = await Child.start(ChildSpec("child", argv, dict(os.environ)))
    print(child.pid, flush=True)
    await child.wait()

asyncio.run(main())
"""
