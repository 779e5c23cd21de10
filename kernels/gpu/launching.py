"""Launches of our kernels; or, ahead of them, only their compilation, on all cores at once.

A kernel is compiled anew for other types, alignments and constants of its arguments, so only a
launch can tell which one it wants. Within `compile_ahead`, launches do no more than that.
"""

import functools
import hashlib
import logging
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm
from triton import knobs
from triton.compiler import CompiledKernel
from triton.runtime import driver
from triton.runtime.cache import get_cache_manager

from kernels.gpu.forks import call_in_forks

logger = logging.getLogger(__name__)

# Several times what the slowest kernel takes on a busy machine.
_PATIENCE_S = 60.0
# Each holds a compiler's memory.
_MAX_FORKS = 32


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


def compiles_ahead() -> bool:
    """Whether this thread's launches only compile: the time to ask for other variants, too."""
    return _asked.get() is not None


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
    started_s = time.perf_counter()
    later = _Later()
    with (
        _without_warning(),
        _asking() as kernels,
        AsyncCompileMode(later, ignore_errors=True) as mode,
    ):
        try:
            launch_all()
            asked_s = time.perf_counter() - started_s
            futures = {key: kernel.future for key, kernel in mode.future_kernels.items()}
            new = [future for key, future in futures.items() if not _is_on_disk(key)]
            _compile_in_forks([later.calls[future] for future in new], progress=progress)
            errors = later.run()
        except BaseException as error:
            later.fail(error)
            _forget_failed(kernels)
            raise
    if errors:
        _forget_failed(kernels)
        logger.warning(
            "compiling kernels left %d to their first launch: %r", len(errors), errors[0]
        )
    if futures:
        logger.info(
            "compiled %d kernels and found %d on disk in %.1f s, of which asking took %.1f",
            len(new) - len(errors),
            len(futures) - len(new),
            time.perf_counter() - started_s,
            asked_s,
        )


def warn_of_compilations() -> None:
    """From now on logs which kernel a launch compiles; those compiled ahead are none."""
    knobs.compilation.listener = _warn


def _warn(*, src: Any, times: Any, cache_hit: bool, **_: object) -> None:  # noqa: ANN401
    if not cache_hit:
        # What is no function has none.
        constants = getattr(src, "constants", {})
        constants = (f"{src.fn.arg_names[at]}={it}" for (at, *_), it in constants.items())
        seconds = times.total / 1e6
        logger.warning(
            "a step waited %.2f s for a kernel: %s(%s)", seconds, src.name, ", ".join(constants)
        )


@contextmanager
def _without_warning() -> Iterator[None]:
    listener = knobs.compilation.listener
    if listener is _warn:
        knobs.compilation.listener = None
    try:
        yield
    finally:
        knobs.compilation.listener = listener


class _Later(Executor):
    """Keeps what it is to call until it's told to."""

    def __init__(self) -> None:
        self.calls: dict[Future[Any], Callable[[], CompiledKernel]] = {}

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:  # noqa: ANN401
        future: Future[Any] = Future()
        self.calls[future] = functools.partial(fn, *args, **kwargs)
        return future

    def run(self) -> list[Exception]:
        """Returns what went wrong."""
        errors: list[Exception] = []
        for future, call in self.calls.items():
            try:
                future.set_result(call())
            except Exception as error:  # noqa: BLE001  (whatever a compiler raises)
                errors.append(error)
                future.set_exception(error)
        return errors

    def fail(self, error: BaseException) -> None:
        for future in self.calls:
            if not future.done():
                future.set_exception(error)


def _is_on_disk(key: str) -> bool:
    """Whether Triton's cache has the kernel of this key; at worst it's looked for once more."""
    try:
        cache: Any = get_cache_manager(hashlib.sha256(key.encode()).hexdigest())
    except OSError:  # a disk that can't be written
        return False
    # Other caches than Triton's own are no directories.
    directory = getattr(cache, "cache_dir", None)
    return directory is not None and any(Path(directory).glob("__grp__*"))


def _compile_in_forks(calls: list[Callable[[], CompiledKernel]], *, progress: bool) -> None:
    """Leaves on disk what each of `calls` compiles, where that goes well.

    In threads they would wait for each other: a kernel's way to its first representation is
    Python's, and goes on for a third of the time.
    """
    if len(calls) < 2 or knobs.compilation.always_compile:
        return
    both = [functools.partial(_compile_with_launcher, call) for call in calls]
    num_forks = min(len(os.sched_getaffinity(0)), _MAX_FORKS)
    done = call_in_forks(both, num_forks, patience_s=_PATIENCE_S)
    shown = tqdm(done, "compiling kernels", len(calls), disable=not progress, leave=False)
    num_done = sum(1 for _ in shown)
    if num_done < len(calls):
        logger.warning(
            "forks compiled %d of %d kernels; the others come one by one", num_done, len(calls)
        )


def _compile_with_launcher(compile_kernel: Callable[[], CompiledKernel]) -> None:
    """Before 3.7, Triton has a C compiler make a launcher for each kernel, at its first launch; it
    stays on disk, too."""
    kernel = compile_kernel()
    launcher = driver.active.launcher_cls  # pyright: ignore[reportAttributeAccessIssue]
    launcher(kernel.src, kernel.metadata)


@contextmanager
def _asking() -> Iterator[set[Kernel]]:
    kernels: set[Kernel] = set()
    token = _asked.set(kernels)
    try:
        yield kernels
    finally:
        _asked.reset(token)


def _forget_failed(kernels: set[Kernel]) -> None:
    """Some Tritons would raise a failed compilation's error at every launch from then on."""
    for kernel in kernels:
        for compiled, *_ in kernel.device_caches.values():  # pyright: ignore[reportAttributeAccessIssue]
            failed = [key for key, it in compiled.items() if not isinstance(it, CompiledKernel)]
            for key in failed:
                del compiled[key]
