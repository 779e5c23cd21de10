"""Launches of our kernels; or, ahead of them, only their compilation, on all cores at once.

A kernel is compiled anew for other types, alignments and constants of its arguments, so only a
launch can tell which one it wants. Within `compile_ahead`, launches do no more than that.
"""

import functools
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol

from tqdm import tqdm
from triton.compiler import CompiledKernel
from triton.runtime import driver

logger = logging.getLogger(__name__)


class Kernel(Protocol):
    """What Triton's and Gluon's decorators make of a function."""

    def run(self, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any: ...  # noqa: ANN401


# The kernels asked for so far by the launches of a thread that compiles ahead.
_asked: ContextVar[set[Kernel] | None] = ContextVar("kernels asked for", default=None)


def launch(kernel: Kernel, grid: tuple[int, ...]) -> Callable[..., Any]:
    """To be called with the kernel's arguments. Within `compile_ahead` nothing runs: outputs, and
    all that was to be written, stay as they are."""
    asked = _asked.get()
    if asked is not None:
        asked.add(kernel)
    return functools.partial(kernel.run, grid=grid, warmup=asked is not None)


def compile_ahead(launch_all: Callable[[], object], *, progress: bool) -> None:
    """Compiles the kernels that `launch_all` launches on this thread, without running any.

    `launch_all` must not depend on what kernels compute. Those in memory cost nothing, those in
    Triton's cache on disk a millisecond; what can't be compiled is left to its first launch.
    """
    try:
        from triton import AsyncCompileMode
    except ImportError:
        logger.info("this Triton compiles kernels one by one, as they are launched")
        return
    # Python 3.11 may fail to parse in several threads at once: what failed is tried again, in one.
    for num_threads in (len(os.sched_getaffinity(0)), 1):
        errors = _compile(AsyncCompileMode, launch_all, num_threads, progress=progress)
        if not errors:
            return
    logger.warning("compiling kernels left %d to their first launch: %r", len(errors), errors[0])


def _compile(
    mode_type: Any,  # noqa: ANN401
    launch_all: Callable[[], object],
    num_threads: int,
    *,
    progress: bool,
) -> list[BaseException]:
    """Compiles what isn't in memory, and returns what went wrong."""
    started_s = time.perf_counter()
    # Compiling begins in Python, and torch gives up its lock at every operation: beside threads
    # that compile, the launches would wait for it again and again.
    all_asked = threading.Event()
    with (
        ThreadPoolExecutor(num_threads, "compiler", initializer=all_asked.wait) as pool,
        _asking() as kernels,
        mode_type(pool, ignore_errors=True) as mode,
    ):
        try:
            launch_all()
        finally:
            all_asked.set()
        asked_s = time.perf_counter() - started_s
        futures: list[Future[Any]] = mode.raw_futures
        for future in tqdm(
            as_completed(futures),
            "compiling kernels",
            len(futures),
            disable=not progress,
            leave=False,
        ):
            if future.exception() is None:
                pool.submit(_build_launcher, future.result())
        errors = [error for future in futures if (error := future.exception()) is not None]
    if errors:
        _forget_failed(kernels)
    if futures:
        logger.info(
            "compiled %d kernels, or found them on disk, in %.1f s, of which asking took %.1f",
            len(futures) - len(errors),
            time.perf_counter() - started_s,
            asked_s,
        )
    return errors


@contextmanager
def _asking() -> Iterator[set[Kernel]]:
    kernels: set[Kernel] = set()
    token = _asked.set(kernels)
    try:
        yield kernels
    finally:
        _asked.reset(token)


def _build_launcher(kernel: CompiledKernel) -> None:
    """Before 3.7, Triton has a C compiler make a launcher for each kernel, at its first launch; it
    stays on disk, too."""
    launcher = driver.active.launcher_cls  # pyright: ignore[reportAttributeAccessIssue]
    launcher(kernel.src, kernel.metadata)


def _forget_failed(kernels: set[Kernel]) -> None:
    """Some Tritons would raise a failed compilation's error at every launch from then on."""
    for kernel in kernels:
        for compiled, *_ in kernel.device_caches.values():  # pyright: ignore[reportAttributeAccessIssue]
            failed = [key for key, it in compiled.items() if not isinstance(it, CompiledKernel)]
            for key in failed:
                del compiled[key]
