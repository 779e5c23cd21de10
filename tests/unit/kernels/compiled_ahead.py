"""Kernels are compiled ahead for an H100, which takes none; only the driver that would know of one
is made up. `test_kernels_launching.py` runs these in a process of its own."""

import errno
import logging
import os
import re
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

from kernels.gpu import block_copy, launching
from kernels.gpu import decode_attention as decode_module
from kernels.gpu import prefill_attention as prefill_module
from kernels.gpu import rope as rope_module
from kernels.gpu import widened_blocks as widened_module
from kernels.gpu.decode_attention import decode_attention
from kernels.gpu.decode_plan import plan_contexts
from kernels.gpu.decode_rope import NewTokens
from kernels.gpu.launching import compile_ahead, launch
from kernels.gpu.prefill_attention import prefill_attention
from kernels.kv_format import KVScales


def _fill(out, size, VALUE: tl.constexpr):  # noqa: N803
    at = tl.arange(0, 16)
    tl.store(out + at, VALUE, mask=at < size)


def _fail(out, VALUE: tl.constexpr):  # noqa: N803
    tl.static_assert(VALUE == 0)
    tl.store(out, VALUE)


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


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Log]:
    """Where no kernel is on disk at first."""
    log = Log(tmp_path / "log")
    monkeypatch.setattr(triton.runtime.driver, "_active", Hopper(tmp_path / "launchers"))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    with triton.knobs.compilation.scope():
        triton.knobs.compilation.listener = log.listen
        yield log


def fill(kernel: Any, *values: int) -> torch.Tensor:
    out = torch.zeros(16, dtype=torch.int32)
    for value in values:
        launch(kernel, (1,))(out, 7, VALUE=value)
    return out


def memory_of(kernel: Any) -> list[Any]:
    return list(kernel.device_caches[0][0].values())


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


def test_other_batches_make_no_other_kernel(log: Log) -> None:
    """A step with prompts would stand still for seconds until one is compiled."""
    q = torch.zeros(2, 8, 128, dtype=torch.bfloat16)
    pool = torch.zeros(4, 1, 2, 2, 16, 128, dtype=torch.float8_e4m3fn)

    def launch_all() -> None:
        for width in (1, 16, 17):
            batch = replace(make_batch([(1, 9), (1, 9)], 16), max_kv_len=1 << 14)
            batch = replace(batch, block_tables=torch.zeros(2, width, dtype=torch.int32))
            for attend in (decode_attention, prefill_attention):
                attend(q, pool, 0, batch, scale=1.0, sliding_window=None, softcap=None)
        for num_seqs in (1, 3, 16, 30):
            batch = make_batch([(1, 9)] * num_seqs, 16)
            # An address that is no multiple of 16.
            behind = torch.cat((batch.kv_lens[:1], batch.kv_lens))[1:]
            for kv_lens, window in ((batch.kv_lens, None), (behind, 64)):
                plan_contexts(replace(batch, kv_lens=kv_lens), pool, window)

    compile_ahead(launch_all, progress=False)
    # Prompts have two, one for contexts in parts.
    kernels = ["_decode_kernel", "_plan_kernel", "_prefill_kernel", "_prefill_kernel"]
    assert log.names("forked") == kernels


def test_other_numbers_of_tokens_make_no_other_kernel(
    log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ["_rope_and_store_kv_kernel", "_rotated_fp8_kernel"]
    for name in names:
        monkeypatch.setattr(rope_module, name, fresh(getattr(rope_module, name)))
    pool = torch.zeros(4, 1, 2, 2, 16, 128, dtype=torch.float8_e4m3fn)
    cos_sin = torch.zeros(32, 128)

    def launch_all() -> None:
        for num_tokens in (1, 3, 16, 30):
            batch = make_batch([(num_tokens, num_tokens)], 16)
            q = torch.zeros(num_tokens, 8, 128, dtype=torch.bfloat16)
            k, v = torch.zeros(2, num_tokens, 2, 128, dtype=torch.bfloat16)
            rope_module.rope_and_store_kv(q, k, v, cos_sin, batch, pool, 0)
            rope_module.rotated_fp8(q, cos_sin, batch.positions)

    compile_ahead(launch_all, progress=False)
    assert log.names("forked") == names


def test_other_numbers_of_blocks_make_no_other_kernel(
    log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "_copy_blocks_kernel"
    monkeypatch.setattr(block_copy, name, fresh(block_copy._copy_blocks_kernel))
    pool = torch.zeros(8, 64, dtype=torch.uint8)

    def launch_all() -> None:
        for count in (1, 3, 4, 8):
            # As the copier has them.
            ids = torch.arange(2 * count, dtype=torch.int32)
            block_copy.copy_blocks(pool, ids[:count], pool, ids[count:])

    compile_ahead(launch_all, progress=False)
    assert log.names("forked", "here") == [name]


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


# Ada, Hopper, and Blackwell for datacenters and for desks.
@pytest.mark.parametrize("arch", [89, 90, 100, 120])
def test_decode_attention_compiles_for_cards_and_groups(
    log: Log, monkeypatch: pytest.MonkeyPatch, arch: int
) -> None:
    monkeypatch.setattr(triton.runtime.driver.active, "arch", arch)
    monkeypatch.setattr(decode_module, "_decode_kernel", fresh(decode_module._decode_kernel))

    def launch_all() -> None:
        # A group that fits in the fewest columns, and one that fills as many again; one sequence
        # and several, which have other tiles.
        for group, num_seqs in ((4, 1), (16, 1), (16, 40)):
            q = torch.zeros(num_seqs, 2 * group, 128, dtype=torch.bfloat16)
            for dtype in (torch.bfloat16, torch.float8_e4m3fn):
                pool = torch.zeros(4, 1, 2, 2, 16, 128, dtype=dtype)
                batch = make_batch([(1, 9)] * num_seqs, 16)
                options: dict[str, Any] = {"scale": 1.0, "sliding_window": None, "softcap": None}
                decode_attention(q, pool, 0, batch, **options)

    compile_ahead(launch_all, progress=False)
    assert all(isinstance(each, CompiledKernel) for each in memory_of(decode_module._decode_kernel))
    assert log.names("forked", "here").count("_decode_kernel") == 6


@pytest.mark.parametrize("arch", [89, 90, 100, 120])
def test_prompts_over_contexts_in_parts_compile_for_cards(
    log: Log, monkeypatch: pytest.MonkeyPatch, arch: int
) -> None:
    """And any step asks for both kinds, though a card may have too few programs for parts of it."""
    monkeypatch.setattr(triton.runtime.driver.active, "arch", arch)
    monkeypatch.setattr(prefill_module, "_prefill_kernel", fresh(prefill_module._prefill_kernel))

    def launch_all() -> None:
        for head_dim in (128, 256):
            q = torch.zeros(3, 8, head_dim, dtype=torch.bfloat16)
            pool = torch.zeros(4, 1, 2, 2, 16, head_dim, dtype=torch.float8_e4m3fn)
            options: dict[str, Any] = {"scale": 1.0, "sliding_window": None, "softcap": None}
            prefill_attention(q, pool, 0, make_batch([(3, 9)], 16), **options)

    compile_ahead(launch_all, progress=False)
    compiled = memory_of(prefill_module._prefill_kernel)
    assert len(compiled) == 4
    assert all(isinstance(each, CompiledKernel) for each in compiled)


@pytest.mark.parametrize("arch", [89, 90, 100, 120])
@pytest.mark.parametrize(
    ("head_dim", "dtype", "kv_dtype"),
    [
        (32, torch.float32, torch.float8_e4m3fn),
        (128, torch.bfloat16, torch.float8_e4m3fn),
        (256, torch.bfloat16, torch.float8_e5m2),
    ],
)
def test_turning_compiles_for_cards_and_heads(
    log: Log,
    monkeypatch: pytest.MonkeyPatch,
    arch: int,
    head_dim: int,
    dtype: torch.dtype,
    kv_dtype: torch.dtype,
) -> None:
    """And what is too large for 8 bits is left to their instructions, which see to it."""
    for module in (rope_module, decode_module):
        monkeypatch.setattr(module, "bound_of", lambda *_: None)
    monkeypatch.setattr(triton.runtime.driver.active, "arch", arch)
    kernels = (
        (decode_module, "_decode_kernel"),
        (rope_module, "_rope_and_store_kv_kernel"),
        (rope_module, "_rotated_fp8_kernel"),
        (widened_module, "_widen_blocks_kernel"),
    )
    for module, name in kernels:
        monkeypatch.setattr(module, name, fresh(getattr(module, name)))

    def launch_all() -> None:
        q = torch.zeros(3, 8, head_dim, dtype=dtype)
        k, v = torch.zeros(2, 3, 2, head_dim, dtype=dtype)
        pool = torch.zeros(4, 1, 2, 2, 16, head_dim, dtype=kv_dtype)
        batch, cos_sin = make_batch([(1, 9)] * 3, 16), torch.zeros(9, head_dim)
        rope_module.rope_and_store_kv(q, k, v, cos_sin, batch, pool, 0)
        rope_module.rotated_fp8(q, cos_sin, batch.positions)
        new = NewTokens(k, v, cos_sin, KVScales())
        options: dict[str, Any] = {"scale": 1.0, "sliding_window": None, "softcap": None}
        decode_attention(q, pool, 0, batch, new=new, **options)
        if dtype.itemsize == 2:
            widened_module.widen_blocks(pool, 0, batch, dtype, turns_back=True)

    compile_ahead(launch_all, progress=False)
    for module, name in kernels:
        compiled = memory_of(getattr(module, name))
        assert all(isinstance(each, CompiledKernel) for each in compiled)
        assert len(compiled) == (1 if dtype.itemsize == 2 or module is not widened_module else 0)
        if module is not widened_module:
            rounded = re.findall(r"cvt\.rn\.(\S*e[45]m[23]x2)\.f", compiled[0].asm["ptx"])
            assert rounded
            assert all(each.startswith("satfinite.") for each in rounded)


def fresh(kernel: Any) -> Any:
    """That has nothing in memory."""
    return JITFunction(
        kernel.fn,
        do_not_specialize=kernel.do_not_specialize,
        do_not_specialize_on_alignment=kernel.do_not_specialize_on_alignment,
    )
