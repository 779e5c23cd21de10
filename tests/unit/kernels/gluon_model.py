"""Runs Gluon kernels for Hopper without one: a thread for each warpgroup, shared memory and all.

Triton's interpreter doesn't know Gluon. This one runs a kernel's own source over torch tensors on
the CPU: barriers count arrivals and bytes and block, products are computed only once they are
waited for, and a test fails where shared memory is touched too early or too late
(gluon_memory.py), or waited for in vain. It knows what our kernels use, but no registers' layouts.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from gluon_memory import Buffer, Buffers
from gluon_threads import (
    MAX_CLOCKS,
    Barrier,
    Barriers,
    Program,
    fence,
    give_turn,
    run,
    this_thread,
)
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.runtime.jit import JITFunction

# Two float32 numbers to the halves of a register, the first to the lower one.
_ROUNDINGS = {
    "cvt.rn.bf16x2.f32 $0, $2, $1;": torch.bfloat16,
    "cvt.rn.f16x2.f32 $0, $2, $1;": torch.float16,
}


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

    def to(self, dtype: torch.dtype) -> "Pointer":
        assert dtype is torch.int64
        return self


class Constant(int):
    """A module's `gl.constexpr`, whose value its Python reads."""

    @property
    def value(self) -> int:
        return int(self)


def _arrive(barrier: Barrier, *, count: int, pred: Any = True) -> None:
    if pred:
        barrier.change(count, 0)


def _expect(barrier: Barrier, num_bytes: int, pred: Any = True) -> None:  # noqa: FBT002
    if pred:
        barrier.change(1, num_bytes)


def _copy(
    desc: TensorDescriptor, at: Sequence[Any], barrier: Barrier, to: Buffer, *, pred: Any = True
) -> None:
    """Reads zeros past the ends, which count as bytes, too."""
    if not pred:
        return
    assert len(at) == len(desc.shape)
    base = desc.base.as_strided(desc.shape, desc.strides, desc.base.storage_offset())
    box = torch.zeros(desc.block_shape, dtype=base.dtype)
    starts = [int(start) for start in at]
    ends = list(map(min, map(int.__add__, starts, desc.block_shape), desc.shape))
    firsts = [max(start, 0) for start in starts]
    if all(first < end for first, end in zip(firsts, ends, strict=True)):
        bounds = list(zip(starts, firsts, ends, strict=True))
        inside = tuple(slice(first - start, end - start) for start, first, end in bounds)
        box[inside] = base[tuple(slice(first, end) for _, first, end in bounds)]
    to.copy(box, barrier)


def _multiply(
    a: Any, b: Buffer, sums: Tensor, *, use_acc: bool = True, is_async: bool = False
) -> Tensor:
    """Not a number until it is waited for."""
    assert is_async
    assert a.dtype is b.dtype
    for operand in (a, b):
        if isinstance(operand, Buffer):
            operand.use()
    result = torch.full_like(sums, torch.nan)

    def finish() -> None:
        left, right = (x.multiplied() if isinstance(x, Buffer) else x.float() for x in (a, b))
        product = left @ right
        result.copy_(product + sums if use_acc else product)

    this_thread().products.append(finish)
    return result


def _wait(num_left: int, *, deps: list[Tensor]) -> Tensor | tuple[Tensor, ...]:
    products = this_thread().products
    while len(products) > num_left:
        products.pop(0)()
    return deps[0] if len(deps) == 1 else tuple(deps)


def _load(
    pointer: Pointer, *, mask: Any = True, other: Any = 0, volatile: bool = False, **_: Any
) -> Tensor:
    if volatile:
        give_turn()
    at = torch.where(torch.as_tensor(mask), torch.as_tensor(pointer.at), 0)
    return torch.where(torch.as_tensor(mask), pointer.memory[at], other)


def _store(pointer: Pointer, value: Any, *, mask: Tensor | None = None) -> None:
    at, value = torch.as_tensor(pointer.at), torch.as_tensor(value, dtype=pointer.memory.dtype)
    if mask is not None:
        at, value = at[mask.expand_as(at)], value[mask.expand_as(at)]
    pointer.memory[at] = value


def _atomic_add(pointer: Pointer, value: int, **_: str) -> int:
    give_turn()
    before = int(pointer.memory[pointer.at])
    pointer.memory[pointer.at] += value
    return before


def _atomic_max(pointer: Pointer, value: Tensor, *, mask: Tensor, **_: str) -> None:
    at = pointer.at[mask]
    pointer.memory[at] = torch.maximum(pointer.memory[at], value[mask])


def _allocate(dtype: torch.dtype, shape: list[int], layout: Any) -> Buffers | Barriers:
    if dtype is torch.int64:
        program = this_thread().program
        return Barriers([Barrier(program) for _ in range(shape[0])])
    return Buffers.allocate(dtype, shape, layout)


def _specialize(partitions: list[tuple[Callable[..., None], tuple[Any, ...]]], *_: Any) -> None:
    functions = [lambda f=function, a=arguments: f(*a) for function, arguments in partitions]
    this_thread().program.specialize(functions)


def _inline_asm(
    asm: str, constraints: str, args: list[Tensor], *, dtype: torch.dtype, is_pure: bool, pack: int
) -> Tensor:
    if asm.startswith("fence.proxy.async.global;"):
        assert not is_pure
        return args[0]
    if asm.startswith("ld.acquire.gpu.global"):
        assert not is_pure
        give_turn()
        return args[0].memory[args[0].at]
    assert (_ROUNDINGS[asm], constraints, is_pure, pack) == (dtype, "=r,f,f", True, 2)
    return args[0].to(dtype)


def _least(a: Any, b: Any) -> Tensor:
    return torch.minimum(torch.as_tensor(a), torch.as_tensor(b))


def _largest(a: Any, b: Any) -> Tensor:
    return torch.maximum(torch.as_tensor(a), torch.as_tensor(b))


_to = Tensor.to


def _cast(tensor: Tensor, *to: Any, bitcast: bool = False, **options: Any) -> Tensor:
    return tensor.view(*to) if bitcast else _to(tensor, *to, **options)


MODEL = {
    "gl": SimpleNamespace(
        abs=torch.abs,
        allocate_shared_memory=_allocate,
        arange=lambda start, end, **_: torch.arange(start, end),
        atomic_add=_atomic_add,
        atomic_max=_atomic_max,
        bfloat16=torch.bfloat16,
        BlockedLayout=lambda *_: None,
        constexpr=None,
        convert_layout=lambda value, *_, **__: value,
        DotOperandLayout=lambda _, parent, *__: SimpleNamespace(parent=parent),
        exp2=torch.exp2,
        float8e4nv=torch.float8_e4m3fn,
        float16=torch.float16,
        float32=torch.float32,
        fma=lambda a, b, c: a * b + c,
        full=lambda shape, value, dtype, **_: torch.full(shape, value, dtype=dtype),
        inline_asm_elementwise=_inline_asm,
        int32=torch.int32,
        int64=torch.int64,
        load=_load,
        max=torch.amax,
        maximum=_largest,
        minimum=_least,
        num_programs=lambda _: this_thread().program.num_programs,
        NVMMADistributedLayout=lambda *_: None,
        NVMMASharedLayout=gl.NVMMASharedLayout,
        program_id=lambda _: this_thread().program.number,
        rsqrt=torch.rsqrt,
        SliceLayout=lambda *_: None,
        split=lambda value: value.unbind(-1),
        static_range=range,
        store=_store,
        sum=torch.sum,
        warp_specialize=_specialize,
        where=torch.where,
        zeros=lambda shape, dtype, **_: torch.zeros(shape, dtype=dtype),
    ),
    "fence_async_shared": fence,
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
    "warpgroup_mma_init": lambda sums: sums,
    "warpgroup_mma_wait": _wait,
}


class ModelledKernel:
    """Launched as the kernel is; options of the compiler are ignored."""

    def __init__(self, kernel: JITFunction[Any]) -> None:
        self._function = kernel.fn
        self._params = kernel.params

    def run(self, *arguments: Any, grid: tuple[int], warmup: bool, **options: Any) -> None:
        assert not warmup
        names = [param.name for param in self._params]
        values = dict(zip(names, arguments, strict=False)) | {
            name: value for name, value in options.items() if name in names
        }
        if "PDL" in names:
            values["PDL"] = True
        for param in self._params:
            value = values[param.name]
            if isinstance(value, Tensor):
                values[param.name] = Pointer(value.view(-1))
            elif isinstance(value, TensorDescriptor):
                value.dtype = value.base.dtype
            elif isinstance(value, int) and not param.is_constexpr:
                values[param.name] = torch.tensor(value)
        clock = torch.zeros(MAX_CLOCKS, dtype=torch.int32)
        programs = [Program(i, grid[0]).new_thread(clock) for i in range(grid[0])]
        run([(program, lambda: self._function(**values)) for program in programs])


def run_modelled(patch: pytest.MonkeyPatch, kernel: str, *modules: ModuleType) -> None:
    """Has the functions of `modules` run in the model, and the kernel of that name launched so."""
    # Other names of Gluon's tensors are torch's, too.
    patch.setattr(Tensor, "expand_dims", Tensor.unsqueeze, raising=False)
    patch.setattr(Tensor, "to", _cast)
    for module in modules:
        for name, value in list(vars(module).items()):
            if name in MODEL:
                patch.setattr(module, name, MODEL[name])
            elif name == kernel:
                patch.setattr(module, name, ModelledKernel(value))
            elif isinstance(value, JITFunction):
                patch.setattr(module, name, value.fn)
            elif isinstance(value, gl.constexpr):
                constant = value.value
                patch.setattr(
                    module, name, Constant(constant) if isinstance(constant, int) else constant
                )


def change_source(
    patch: pytest.MonkeyPatch, function: Callable[..., Any], old: str, new: str, *users: ModuleType
) -> None:
    """Has the modules `users` call the modelled function as it were with `old`, once, as `new`."""
    source = inspect.getsource(function)
    assert source.count(old) == 1
    source = source[source.index("def ") :].replace(old, new)
    changed: dict[str, Any] = {}
    exec(compile(source, inspect.getfile(function), "exec"), function.__globals__, changed)
    for module in users:
        patch.setattr(module, function.__name__, changed[function.__name__])
