import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from unreadable import NESTED_JSON

from cli.runtime_dir import StackProcess, StackRecord, local_stacks, runtime_dir
from protocol.errors import StartupError


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def record(pid: int) -> StackRecord:
    process = StackProcess(name="redis", role="redis", pid=1, state="ready")
    return StackRecord(
        supervisor_pid=pid,
        started_unix_s=1.0,
        model="m",
        url="http://127.0.0.1:1",
        redis_url="unix:///x",
        processes=[process],
    )


def test_a_running_stack_is_listed_and_leaves_nothing(temporary):
    with runtime_dir() as directory:
        stack = record(int(directory.path.name))
        directory.write_record(stack)
        assert local_stacks() == [stack]
        assert directory.path.stat().st_mode & 0o777 == 0o700
    assert list(temporary.iterdir()) == []
    assert local_stacks() == []


def test_a_dead_stack_is_not_listed(temporary):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    with runtime_dir() as directory:
        directory.write_record(record(ended.pid))
        assert local_stacks() == []


@pytest.mark.parametrize("content", [b"{", b'{"model": "\xff"}', NESTED_JSON])
def test_what_is_no_record_is_not_listed(temporary, content: bytes):
    with runtime_dir() as directory:
        directory.write_record(record(int(directory.path.name)))
        (directory.path / "stack.json").write_bytes(content)
        assert local_stacks() == []


def test_kill_9_of_the_supervisor_leaves_nothing(temporary):
    script = (
        "import signal\nfrom cli.runtime_dir import runtime_dir\n"
        "with runtime_dir() as d:\n print(d.path, flush=True)\n signal.pause()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        stdout=subprocess.PIPE,
        text=True,
        env={"TMPDIR": str(temporary), "PATH": "/usr/bin:/bin"},
    )
    assert process.stdout is not None
    path = Path(process.stdout.readline().strip())
    assert path.is_dir()
    process.kill()
    process.wait()
    process.stdout.close()
    deadline_s = time.monotonic() + 10
    while list(temporary.iterdir()):
        assert time.monotonic() < deadline_s, "the guardian removed nothing"
        time.sleep(0.01)


def test_a_path_too_long_for_a_socket_is_refused(tmp_path, monkeypatch):
    deep = tmp_path / ("x" * 100)
    deep.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(deep))
    with pytest.raises(StartupError, match="TMPDIR"), runtime_dir():
        pass
