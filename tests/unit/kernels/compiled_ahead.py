"""Kernels are compiled ahead. `test_kernels_launching.py` runs these in a process of its own."""

import errno
import logging
import os
import re
import threading
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
import triton
import triton.language as tl
from compiled_cases import Log, kernel_log, memory_of  # noqa: F401  (a fixture)
from triton.compiler import CompiledKernel
from triton.runtime.jit import JITFunction

from kernels.gpu import launching
from kernels.gpu.launching import compile_ahead, launch


def _fill(out, size, VALUE: tl.constexpr):  # noqa: N803
    at = tl.arange(0, 16)
    tl.store(out + at, VALUE, mask=at < size)


def _fail(out, VALUE: tl.constexpr):  # noqa: N803
    tl.static_assert(VALUE == 0)
    tl.store(out, VALUE)


def fill(kernel: Any, *values: int) -> torch.Tensor:
    out = torch.zeros(16, dtype=torch.int32)
    for value in values:
        launch(kernel, (1,))(out, 7, VALUE=value)
    return out


def test_each_kernel_is_compiled_once_and_then_found(log: Log) -> None:
    kernel = JITFunction(_fill)
    written: list[torch.Tensor] = []
    compile_ahead(lambda: written.append(fill(kernel, 1, 2, 1, 1, 2)), progress=False)
    assert log.names("forked", "here") == log.names("forked") == ["_fill", "_fill"]
    assert not written[0].any()
    assert all(isinstance(each, CompiledKernel) for each in memory_of(kernel))
    num_found = len(log.names("found"))
    compile_ahead(lambda: fill(kernel, 2, 1), progress=False)
    kernel.run(torch.zeros(16, dtype=torch.int32), 7, VALUE=2, grid=(1,), warmup=True)
    assert len(log.names("found")) == num_found == 2
    other_process = JITFunction(_fill)
    compile_ahead(lambda: fill(other_process, 2, 3), progress=False)
    # A single one that is new isn't worth a fork.
    assert (log.names("here"), log.names("found")[num_found:]) == (["_fill"], ["_fill"])


def test_nothing_is_compiled_before_all_is_asked_for(log: Log) -> None:
    def launch_all() -> None:
        fill(JITFunction(_fill), 1, 2)
        assert not log.names("forked", "here", "found")

    compile_ahead(launch_all, progress=False)
    assert log.names("forked") == ["_fill", "_fill"]


def test_what_does_not_compile_is_left_to_its_launch(
    log: Log, caplog: pytest.LogCaptureFixture
) -> None:
    good, bad = JITFunction(_fill), JITFunction(_fail)
    out = torch.zeros(1, dtype=torch.int32)

    def launch_all() -> None:
        launch(bad, (1,))(out, VALUE=1)
        launch(bad, (1,))(out, VALUE=0)
        fill(good, 1)

    with caplog.at_level(logging.WARNING):
        compile_ahead(launch_all, progress=False)
    assert "left 1 to their first launch: CompileTimeAssertionFailure" in caplog.text
    assert log.names("forked") == ["_fail", "_fill"]
    launchers = triton.runtime.driver.active.launchers.read_text().split()
    assert sorted(launchers) == ["_fail", "_fill"]
    assert len(memory_of(bad)) == len(memory_of(good)) == 1
    with pytest.raises(triton.compiler.errors.CompileTimeAssertionFailure):
        bad.run(out, VALUE=1, grid=(1,), warmup=True)


@pytest.mark.parametrize("fate", ["dies", "hangs"])
def test_a_fork_that_ends_badly_leaves_its_kernels_to_this_process(
    log: Log, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, fate: str
) -> None:
    kernel, process = JITFunction(_fill), os.getpid()
    parse = kernel.parse

    def parse_here() -> Any:
        if os.getpid() == process:
            return parse()
        return os._exit(1) if fate == "dies" else threading.Event().wait()

    monkeypatch.setattr(kernel, "parse", parse_here)
    monkeypatch.setattr(launching, "_PATIENCE_S", 0.2)
    with caplog.at_level(logging.WARNING):
        compile_ahead(lambda: fill(kernel, 1, 2), progress=False)
    assert "forks compiled 0 of 2 kernels" in caplog.text
    assert log.names("forked", "here") == log.names("here") == ["_fill", "_fill"]
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)  # no fork is left


def test_without_forks_this_process_compiles(log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> int:
        raise BlockingIOError(errno.EAGAIN, "too many processes")

    monkeypatch.setattr(os, "fork", refuse)
    compile_ahead(lambda: fill(JITFunction(_fill), 1, 2), progress=False)
    assert log.names("here") == ["_fill", "_fill"]


def test_a_cache_that_is_no_directory(log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launching, "get_cache_manager", lambda _: object())
    compile_ahead(lambda: fill(JITFunction(_fill), 1, 2), progress=False)
    assert log.names("forked") == ["_fill", "_fill"]


def test_an_interrupt_ends_it(log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = JITFunction(_fill)

    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(kernel, "parse", interrupted)
    with pytest.raises(KeyboardInterrupt):
        compile_ahead(lambda: fill(kernel, 1), progress=False)
    assert not log.names("forked", "here")


def test_an_error_while_asking_ends_it(log: Log) -> None:
    kernel = JITFunction(_fill)

    def launch_all() -> None:
        fill(kernel, 1)
        raise torch.OutOfMemoryError("too large")

    with pytest.raises(torch.OutOfMemoryError):
        compile_ahead(launch_all, progress=False)
    assert launching._asked.get() is None
    assert not log.names("forked", "here")
    compile_ahead(lambda: fill(kernel, 1, 5), progress=False)
    assert all(isinstance(each, CompiledKernel) for each in memory_of(kernel))
    assert len(memory_of(kernel)) == 2


def test_a_kernel_that_a_launch_compiles_is_named(
    log: Log, caplog: pytest.LogCaptureFixture
) -> None:
    kernel = JITFunction(_fill)
    launching.warn_of_compilations()
    kernel.run(torch.zeros(16, dtype=torch.int32), 7, VALUE=1, grid=(1,), warmup=True)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert re.search(r"a step waited \d+\.\d\d s for a kernel: _fill\(VALUE=1\)", caplog.text)
    caplog.clear()
    found = JITFunction(_fill)
    found.run(torch.zeros(16, dtype=torch.int32), 7, VALUE=1, grid=(1,), warmup=True)
    # Nobody waits for what another engine's start in this process compiles.
    compile_ahead(lambda: fill(kernel, 2, 3), progress=False)
    assert not caplog.records
    kernel.run(torch.zeros(16, dtype=torch.int32), 7, VALUE=4, grid=(1,), warmup=True)
    assert "_fill(VALUE=4)" in caplog.text
