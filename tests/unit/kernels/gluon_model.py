"""Runs Gluon kernels for Hopper without one: a thread for each warpgroup, shared memory and all.

Triton's interpreter doesn't know Gluon. This one runs a kernel's own source over torch tensors on
the CPU: barriers count arrivals and bytes and block, products are computed only once they are
waited for, and whoever waits too long fails the test. It knows what our kernels use.
"""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.runtime.jit import JITFunction

WAIT_S = 30
_LOCK = threading.Lock()
_thread = threading.local()


@dataclass(frozen=True)
class Pointer:
    memory: Tensor
    at: Any = 0

    def __add__(self, offset: Any) -> "Pointer":
        return Pointer(self.memory, self.at + offset)

    def __sub__(self, offset: Any) -> "Pointer":
        return Pointer(self.memory, self.at - offset)

    @property
    def dtype(self) -> SimpleNamespace:
        return SimpleNamespace(element_ty=self.memory.dtype)


@dataclass(frozen=True)
class Shared:
    """Numbers, [n, rows, columns], or n barriers."""

    parts: Sequence[Any]

    def index(self, i: int) -> Any:
        return self.parts[i]


class Barrier:
    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._num_phases = self._left = self._bytes = self._count = 0

    def init(self, count: int) -> None:
        self._left = self._count = count

    def change(self, arrived: int, num_bytes: int) -> None:
        with self._changed:
            self._left -= arrived
            self._bytes += num_bytes
            assert self._left >= 0
            if self._left == self._bytes == 0:
                self._left = self._count
                self._num_phases += 1
                self._changed.notify_all()

    def wait(self, phase: int) -> None:
        with self._changed:
            is_over = self._changed.wait_for(lambda: self._num_phases & 1 != phase, WAIT_S)
        assert is_over, "a barrier is waited for in vain"


def _arrive(barrier: Barrier, *, count: int, pred: bool = True) -> None:
    barrier.change(count if pred else 0, 0)


def _expect(barrier: Barrier, num_bytes: int, pred: bool = True) -> None:  # noqa: FBT001, FBT002
    if pred:
        barrier.change(1, num_bytes)


def _copy(
    desc: TensorDescriptor, at: Sequence[int], barrier: Barrier, to: Tensor, *, pred: bool
) -> None:
    """Reads zeros past the ends, which count as bytes, too."""
    if pred:
        here = desc.base[at[0] :, at[1] :][: to.shape[0], : to.shape[1]].float()
        to.zero_()
        to[: here.shape[0], : here.shape[1]] = here
        barrier.change(0, -to.numel() * desc.base.element_size())


def _multiply(a: Tensor, b: Tensor, sums: Tensor, *, is_async: bool) -> Tensor:
    assert is_async
    _thread.pending.append(lambda: sums.add_(a @ b))
    return sums


def _wait(num_left: int, *, deps: list[Tensor]) -> Tensor:
    while len(_thread.pending) > num_left:
        _thread.pending.pop(0)()
    return deps[0]


def _load(pointer: Pointer, *, mask: Any = True, other: float = 0.0, **_: Any) -> Tensor:
    at = torch.where(torch.as_tensor(mask), torch.as_tensor(pointer.at), 0)
    return torch.where(torch.as_tensor(mask), pointer.memory[at], other)


def _store(pointer: Pointer, value: Any, *, mask: Tensor | None = None) -> None:
    at, value = torch.as_tensor(pointer.at), torch.as_tensor(value, dtype=pointer.memory.dtype)
    if mask is not None:
        at, value = at[mask.expand_as(at)], value[mask.expand_as(at)]
    pointer.memory[at] = value


def _atomic_add(pointer: Pointer, value: int, **_: str) -> int:
    with _LOCK:
        before = int(pointer.memory[pointer.at])
        pointer.memory[pointer.at] += value
    return before


def _allocate(dtype: Any, shape: list[int], layout: Any) -> Shared:
    if dtype is torch.int64:
        return Shared([Barrier() for _ in range(shape[0])])
    # What nobody has written must not be used.
    return Shared(torch.full(shape, torch.nan))


def _specialize(partitions: list[tuple[Callable[..., None], tuple[Any, ...]]], *_: Any) -> None:
    _run([lambda f=function, a=arguments: f(*a) for function, arguments in partitions])


def _run(functions: list[Callable[[], None]]) -> None:
    """All at once, each in a thread of the same program."""
    program, failures = getattr(_thread, "program", None), []

    def run(function: Callable[[], None], own: Any) -> None:
        _thread.program, _thread.pending = own, []
        try:
            function()
            assert not _thread.pending
        except BaseException as error:  # noqa: BLE001  (raised again by the thread that waits)
            failures.append(error)

    threads = [
        threading.Thread(target=run, args=(function, program or (i, len(functions))))
        for i, function in enumerate(functions)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


MODEL = {
    "gl": SimpleNamespace(
        allocate_shared_memory=_allocate,
        arange=lambda start, end, **_: torch.arange(start, end),
        atomic_add=_atomic_add,
        BlockedLayout=lambda *_: None,
        constexpr=None,
        convert_layout=lambda value, *_, **__: value,
        float32=torch.float32,
        int64=torch.int64,
        load=_load,
        minimum=min,
        num_programs=lambda _: _thread.program[1],
        NVMMADistributedLayout=lambda *_: None,
        program_id=lambda _: _thread.program[0],
        SliceLayout=lambda *_: None,
        split=lambda value: value.unbind(-1),
        static_range=range,
        store=_store,
        warp_specialize=_specialize,
        zeros=lambda shape, dtype, **_: torch.zeros(shape, dtype=dtype),
    ),
    "mbarrier": SimpleNamespace(
        MBarrierLayout=lambda: None,
        init=Barrier.init,
        wait=Barrier.wait,
        arrive=_arrive,
        expect=_expect,
    ),
    "tma": SimpleNamespace(async_copy_global_to_shared=_copy),
    "tl": SimpleNamespace(
        debug_barrier=lambda: None,
        extra=SimpleNamespace(
            cuda=SimpleNamespace(gdc_wait=lambda: None, gdc_launch_dependents=lambda: None)
        ),
    ),
    "warpgroup_mma": _multiply,
    "warpgroup_mma_wait": _wait,
}


class ModelledKernel:
    """Launched as the kernel is; options of the compiler are ignored."""

    def __init__(self, kernel: JITFunction[Any]) -> None:
        self._function = kernel.fn
        self._names = kernel.arg_names

    def run(self, *arguments: Any, grid: tuple[int], warmup: bool, **options: Any) -> None:
        assert not warmup
        values = dict(zip(self._names, arguments, strict=False)) | {
            name: value for name, value in options.items() if name in self._names
        }
        values["PDL"] = True
        for name, value in values.items():
            if isinstance(value, Tensor):
                values[name] = Pointer(value.view(-1))
            elif isinstance(value, TensorDescriptor):
                value.dtype = None
        _run([lambda: self._function(**values)] * grid[0])


def run_modelled(patch: pytest.MonkeyPatch, kernel: str, *modules: ModuleType) -> None:
    """Has the functions of `modules` run in the model, and the kernel of that name launched so."""
    for module in modules:
        for name, value in list(vars(module).items()):
            if name in MODEL:
                patch.setattr(module, name, MODEL[name])
            elif name == kernel:
                patch.setattr(module, name, ModelledKernel(value))
            elif isinstance(value, JITFunction):
                patch.setattr(module, name, value.fn)
