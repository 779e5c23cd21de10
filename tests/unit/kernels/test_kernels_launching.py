"""Launches of our kernels, and only their compilation."""

import logging
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
import triton

from kernels.gpu.block_copy import copy_blocks
from kernels.gpu.launching import compile_ahead, launch

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize("name", ["compiled_ahead.py", "compiled_kernels.py"])
def test_kernels_are_compiled(name: str) -> None:
    """In a process of its own: where the interpreter has run, nothing compiles any more."""
    cases = Path(__file__).with_name(name)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(cases)]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    environment["TRITON_INTERPRET"] = "0"
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert " passed" in done.stdout


class Recorded:
    """A kernel that says whether it was to run."""

    def __init__(self) -> None:
        self.runs: list[bool] = []

    def run(self, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        self.runs.append(not warmup)


def test_other_threads_launch_meanwhile() -> None:
    here, there = Recorded(), Recorded()

    def launch_all() -> None:
        launch(here, (1,))()
        thread = threading.Thread(target=lambda: launch(there, (1,))())
        thread.start()
        thread.join()

    compile_ahead(launch_all, progress=False)
    assert (here.runs, there.runs) == ([False], [True])
    launch(here, (1,))()
    assert here.runs == [False, True]


def test_a_triton_that_cannot(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delattr(triton, "AsyncCompileMode")
    kernel = Recorded()
    with caplog.at_level(logging.INFO):
        compile_ahead(lambda: launch(kernel, (1,))(), progress=False)
    assert not kernel.runs
    assert "one by one" in caplog.text


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels run in Triton's interpreter")
def test_wrappers_write_nothing() -> None:
    source, target = torch.ones((4, 64), dtype=torch.uint8), torch.zeros((4, 64), dtype=torch.uint8)
    ids = torch.arange(4, dtype=torch.int32)
    compile_ahead(lambda: copy_blocks(source, ids, target, ids), progress=False)
    assert not target.any()
    copy_blocks(source, ids, target, ids)
    assert torch.equal(target, source)
