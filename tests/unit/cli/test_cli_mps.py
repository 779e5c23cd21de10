"""The daemon of NVIDIA's MPS, played by a script that writes down how it was called."""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from cli.mps import start_mps
from cli.runtime_dir import runtime_dir
from protocol.errors import StartupError

SCRIPT = """#!/bin/sh
if [ "$1" = -d ]; then input=; else input=$(cat); fi
echo "$* $input $CUDA_MPS_PIPE_DIRECTORY" >> {calls}
{then}
"""


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file with a line for each call of the control program, which always succeeds."""
    install(tmp_path, monkeypatch, then="exit 0")
    return tmp_path / "calls"


def install(directory: Path, monkeypatch: pytest.MonkeyPatch, *, then: str) -> None:
    program = directory / "bin" / "nvidia-cuda-mps-control"
    program.parent.mkdir()
    program.write_text(SCRIPT.format(calls=directory / "calls", then=then))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:/usr/bin:/bin")
    monkeypatch.setattr(tempfile, "tempdir", str(directory))


def test_it_runs_as_long_as_the_stack(calls: Path) -> None:
    with runtime_dir() as directory:
        environ = start_mps(directory.mps)
        assert environ["CUDA_MPS_PIPE_DIRECTORY"] == str(directory.mps)
        assert directory.mps.is_dir()
        assert calls.read_text() == f"-d  {directory.mps}\n"
    assert calls.read_text() == f"-d  {directory.mps}\n quit {directory.mps}\n"
    assert not directory.path.exists()


def test_a_stack_without_it_doesnt_call_it(calls: Path) -> None:
    with runtime_dir():
        pass
    assert not calls.exists()


def test_a_daemon_that_doesnt_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, monkeypatch, then='echo "no device" >&2; exit 1')
    with pytest.raises(StartupError, match="nvidia-cuda-mps-control doesn't start: no device"):
        start_mps(tmp_path / "mps")


def test_a_daemon_that_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, monkeypatch, then="exec sleep 60")
    monkeypatch.setattr("cli.mps._START_TIMEOUT_S", 0.2)
    with pytest.raises(StartupError, match="nvidia-cuda-mps-control doesn't start within"):
        start_mps(tmp_path / "mps")


def test_a_daemon_that_doesnt_end_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, monkeypatch, then='[ "$1" = -d ] || exec sleep 20')
    monkeypatch.setattr("cli.runtime_dir._MPS_QUIT_TIMEOUT_S", 0.2)
    with runtime_dir() as directory:
        start_mps(directory.mps)
        start_s = time.monotonic()
    assert time.monotonic() - start_s < 10
    assert " quit " in (tmp_path / "calls").read_text()
    assert not directory.path.exists()


def test_a_machine_without_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(StartupError, match="comes with NVIDIA's driver; it isn't here"):
        start_mps(tmp_path / "mps")


def test_serve_says_so_in_one_sentence(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "cli", "serve", "--gpu-sharing", "mps", "--port", "0"]
    programs, temporary = tmp_path / "bin", tmp_path / "tmp"
    programs.mkdir()
    temporary.mkdir()
    for name in ("cat", "rm", "rmdir"):  # the guardian's
        program = shutil.which(name)
        assert program is not None
        (programs / name).symlink_to(program)
    environ = os.environ | {"PATH": str(programs), "TMPDIR": str(temporary)}
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=60, env=environ
    )
    assert done.returncode == 2
    assert done.stderr.strip().endswith("it isn't here.")
    assert "Traceback" not in done.stderr
    assert list(temporary.iterdir()) == []
