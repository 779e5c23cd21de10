"""Calls in forks leave what they do on disk, and nothing else."""

import os
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from kernels.gpu.forks import call_in_forks

ROOT = Path(__file__).parents[3]
# Prints the fork's number, and then neither ever ends.
LASTING = """
import os, threading
from kernels.gpu.forks import call_in_forks
def last():
    print(os.getpid(), flush=True)
    threading.Event().wait()
list(call_in_forks([last], 1, patience_s=300.0))
"""


def test_each_call_is_made_once(tmp_path: Path) -> None:
    def call(place: int) -> None:
        with (tmp_path / str(place)).open("x") as file:
            file.write(str(os.getpid()))

    calls = [lambda place=place: call(place) for place in range(20)]
    assert sorted(call_in_forks(calls, 3, patience_s=60.0)) == list(range(20))
    pids = {(tmp_path / str(place)).read_text() for place in range(20)}
    assert str(os.getpid()) not in pids
    assert len(pids) <= 3


def test_what_raises_has_ended() -> None:
    assert list(call_in_forks([lambda: 1 / 0], 1, patience_s=60.0)) == [0]


def test_who_hangs_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    forked: list[int] = []
    fork = os.fork

    def noted() -> int:
        forked.append(fork())
        return forked[-1]

    monkeypatch.setattr(os, "fork", noted)
    assert not list(call_in_forks([threading.Event().wait], 1, patience_s=0.1))
    with pytest.raises(ChildProcessError):
        os.waitpid(forked[0], os.WNOHANG)


def test_beside_many_open_files() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < 1200:
        pytest.skip("too few descriptors allowed")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 1200), hard))
    opened = [os.open(os.devnull, os.O_RDONLY) for _ in range(1100)]
    try:
        assert list(call_in_forks([lambda: None], 1, patience_s=60.0)) == [0]
    finally:
        for descriptor in opened:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_forks_end_with_a_killed_parent() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", LASTING], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        status = Path(f"/proc/{int(parent.stdout.readline())}/status")
        parent.send_signal(signal.SIGKILL)
        # The kernel closes the fork's end of the pipe as it ends the fork.
        assert parent.stdout.read() == ""
    deadline_s = time.monotonic() + 60.0
    while is_alive(status):
        assert time.monotonic() < deadline_s
        time.sleep(0.01)


def is_alive(status: Path) -> bool:
    try:
        return "State:\tZ" not in status.read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
