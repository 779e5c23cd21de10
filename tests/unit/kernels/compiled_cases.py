"""An H100 that takes no launch, for tests of compilation: only the driver that would know of one is
made up."""

import os
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

pytest.importorskip("triton")
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction


class Hopper:
    """What Triton asks its driver until a kernel is launched, and its launchers."""

    def __init__(self, launchers: Path) -> None:
        self.arch = 90
        self.launchers = launchers
        launchers.touch()

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def launcher_cls(self, src: Any, metadata: Any) -> None:
        assert metadata.name == src.fn.__name__
        with self.launchers.open("a") as file:
            file.write(f"{metadata.name}\n")


class Log:
    """Names of kernels as they are compiled, in any process, or found on disk by this one."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._process = os.getpid()
        file.touch()

    def listen(self, *, src: Any, cache_hit: bool, **_: Any) -> None:
        if cache_hit and os.getpid() != self._process:
            return
        what = "found" if cache_hit else "here" if os.getpid() == self._process else "forked"
        with self._file.open("a") as file:
            file.write(f"{src.fn.__name__} {what}\n")

    def names(self, *what: str) -> list[str]:
        lines = (line.split() for line in self._file.read_text().splitlines())
        return sorted(name for name, how in lines if how in what)


@pytest.fixture(name="log")
def kernel_log(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Log]:
    """Where no kernel is on disk at first."""
    log = Log(tmp_path / "log")
    monkeypatch.setattr(triton.runtime.driver, "_active", Hopper(tmp_path / "launchers"))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    with triton.knobs.compilation.scope():
        triton.knobs.compilation.listener = log.listen
        yield log


def memory_of(kernel: Any) -> list[Any]:
    return list(kernel.device_caches[0][0].values())


def renew(monkeypatch: pytest.MonkeyPatch, module: ModuleType, name: str) -> None:
    """The module's kernel of this name has nothing in memory."""
    kernel = getattr(module, name)
    renewed = JITFunction(
        kernel.fn,
        do_not_specialize=kernel.do_not_specialize,
        do_not_specialize_on_alignment=kernel.do_not_specialize_on_alignment,
    )
    monkeypatch.setattr(module, name, renewed)
