"""Kernels are compiled ahead for an H100, which takes none; only the driver that would know of one
is made up. `test_kernels_launching.py` runs these in a process of its own."""

import logging
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
import triton
import triton.language as tl
from attention_cases import make_batch
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime.jit import JITFunction

from kernels.gpu import launching
from kernels.gpu.decode_attention import decode_attention
from kernels.gpu.launching import compile_ahead, launch
from kernels.gpu.prefill_attention import prefill_attention


def _fill(out, size, VALUE: tl.constexpr):  # noqa: N803
    at = tl.arange(0, 16)
    tl.store(out + at, VALUE, mask=at < size)


def _fail(out, VALUE: tl.constexpr):  # noqa: N803
    tl.static_assert(VALUE == 0)
    tl.store(out, VALUE)


class Hopper:
    """What Triton asks its driver until a kernel is launched, and its launchers."""

    def __init__(self) -> None:
        self.launched: list[str] = []

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def launcher_cls(self, src: Any, metadata: Any) -> None:
        assert metadata.name == src.fn.__name__
        self.launched.append(metadata.name)


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[list[str]]:
    """The names of kernels as they are compiled or found on disk, where none is at first."""
    names: list[str] = []

    def listen(*, src: Any, cache_hit: bool, **_: Any) -> None:
        names.append(f"{src.fn.__name__}{' found' if cache_hit else ''}")

    monkeypatch.setattr(triton.runtime.driver, "_active", Hopper())
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    with triton.knobs.compilation.scope():
        triton.knobs.compilation.listener = listen
        yield names


def fill(kernel: Any, *values: int) -> torch.Tensor:
    out = torch.zeros(16, dtype=torch.int32)
    for value in values:
        launch(kernel, (1,))(out, 7, VALUE=value)
    return out


def memory_of(kernel: Any) -> list[Any]:
    return list(kernel.device_caches[0][0].values())


def test_each_kernel_is_compiled_once_and_then_found(compiled: list[str]) -> None:
    kernel = JITFunction(_fill)
    written: list[torch.Tensor] = []
    compile_ahead(lambda: written.append(fill(kernel, 1, 2, 1, 1, 2)), progress=False)
    assert compiled == ["_fill", "_fill"]
    assert not written[0].any()
    assert all(isinstance(each, CompiledKernel) for each in memory_of(kernel))
    compile_ahead(lambda: fill(kernel, 2, 1), progress=False)
    kernel.run(torch.zeros(16, dtype=torch.int32), 7, VALUE=2, grid=(1,), warmup=True)
    assert len(compiled) == 2
    other_process = JITFunction(_fill)
    compile_ahead(lambda: fill(other_process, 2, 3), progress=False)
    assert sorted(compiled[2:]) == ["_fill", "_fill found"]


def test_nothing_is_compiled_before_all_is_asked_for(compiled: list[str]) -> None:
    def launch_all() -> None:
        fill(JITFunction(_fill), 1, 2)
        assert not compiled

    compile_ahead(launch_all, progress=False)
    assert len(compiled) == 2


def test_what_does_not_compile_is_left_to_its_launch(
    compiled: list[str], caplog: pytest.LogCaptureFixture
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
    assert sorted(compiled) == ["_fail", "_fill"]
    assert sorted(triton.runtime.driver.active.launched) == ["_fail", "_fill"]
    assert len(memory_of(bad)) == len(memory_of(good)) == 1
    with pytest.raises(triton.compiler.errors.CompileTimeAssertionFailure):
        bad.run(out, VALUE=1, grid=(1,), warmup=True)


def test_what_fails_once_is_tried_again(
    compiled: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    kernel = JITFunction(_fill)
    parse, failures = kernel.parse, [SystemError("two threads parse")]

    def parse_at_last() -> Any:
        if failures and threading.current_thread() is not threading.main_thread():
            raise failures.pop()
        return parse()

    monkeypatch.setattr(kernel, "parse", parse_at_last)
    with caplog.at_level(logging.WARNING):
        compile_ahead(lambda: fill(kernel, 1), progress=False)
    assert compiled == ["_fill"]
    assert not failures
    assert not caplog.text


def test_an_error_while_asking_ends_it(compiled: list[str]) -> None:
    def launch_all() -> None:
        fill(JITFunction(_fill), 1)
        raise torch.OutOfMemoryError("too large")

    with pytest.raises(torch.OutOfMemoryError):
        compile_ahead(launch_all, progress=False)
    assert launching._asked.get() is None
    kernel = JITFunction(_fill)
    compile_ahead(lambda: fill(kernel, 5), progress=False)
    assert isinstance(memory_of(kernel)[0], CompiledKernel)


def test_the_width_of_block_tables_makes_no_other_kernel(compiled: list[str]) -> None:
    """A step with prompts would stand still for seconds until one is compiled."""
    q = torch.zeros(2, 8, 128, dtype=torch.bfloat16)
    pool = torch.zeros(4, 1, 2, 2, 16, 128, dtype=torch.float8_e4m3fn)

    def launch_all() -> None:
        for width in (1, 16, 17):
            batch = replace(make_batch([(1, 9), (1, 9)], 16), max_kv_len=1 << 14)
            batch = replace(batch, block_tables=torch.zeros(2, width, dtype=torch.int32))
            for attend in (decode_attention, prefill_attention):
                attend(q, pool, 0, batch, scale=1.0, sliding_window=None, softcap=None)

    compile_ahead(launch_all, progress=False)
    assert sorted(compiled) == ["_decode_kernel", "_prefill_kernel"]
