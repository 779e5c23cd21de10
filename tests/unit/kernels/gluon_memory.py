"""Shared memory of a modelled Gluon program, where nobody may be too early or too late.

Whatever touches a line notes its time (gluon_threads.py), and whoever comes next must know of it:
so a race fails whichever of the two was faster. Copies are noted by the barrier that counts their
bytes, whose time is its phase. Two threads may store the same numbers at once, and load what was
there before as long as they make nothing of it; what a product reads must be fenced.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from gluon_threads import MAX_CLOCKS, Barrier, Program, this_thread
from torch import Tensor
from triton.experimental.gluon.language import NVMMASharedLayout

LINE_BYTES = 128
NEVER = torch.iinfo(torch.int32).max


class Memory:
    """Lines of numbers, and when which of them was used how."""

    def __init__(self, program: Program, dtype: torch.dtype, num_lines: int, line: int) -> None:
        self.program, self.dtype = program, dtype
        if dtype.is_floating_point:
            # Rounded, but kept in a type that torch computes with.
            self.numbers = torch.full((num_lines, line), torch.nan)
        else:
            self.numbers = torch.full((num_lines, line), torch.iinfo(dtype).min, dtype=dtype)
        self.is_written = torch.zeros(num_lines, dtype=torch.bool)
        shape = (MAX_CLOCKS, num_lines)
        self.copied, self.multiplied, self.loaded = torch.zeros((3, *shape), dtype=torch.int32)
        # By all who stored what is there now; not looked at before any thread stores.
        self.stored = torch.zeros(shape, dtype=torch.int32)
        self.has_stores = False
        # Loaded while another thread stored it: bad, unless whoever did stores the same.
        self.doubted = torch.zeros(shape, dtype=torch.bool)
        program.checks_at_end.append(self._check_loads)

    def unfenced(self, lines: slice) -> Tensor:
        return self.stored[:, lines] > self.program.fenced[:, None]

    def _check_loads(self) -> None:
        assert not self.doubted.any(), "numbers are loaded while another thread stores them"


@dataclass(frozen=True)
class Buffer:
    """Some lines of a memory, or a view of them: a tile's columns of lines one after the other."""

    memory: Memory
    lines: slice
    shape: Sequence[int]
    order: Sequence[int] | None = None
    num_more: int = 0

    @property
    def dtype(self) -> torch.dtype:
        return self.memory.dtype

    def permute(self, order: Sequence[int]) -> "Buffer":
        return replace(self, order=order)

    def _reinterpret(self, dtype: torch.dtype, shape: Sequence[int], layout: Any) -> "Buffer":
        """With rows of what lies behind a tile, in which nobody is interested."""
        line = self.memory.numbers.shape[1]
        assert (dtype, self.shape[1:], _line(layout)) == (self.dtype, shape[1:], line)
        assert shape[1:] == [line], "rows of several lines aren't side by side"
        # Lines are swizzled in eights, and the memory doesn't end here.
        num_more = shape[0] - self.shape[0]
        assert self.shape[0] % 8 == 0 <= num_more <= len(self.memory.numbers) - self.lines.stop
        return replace(self, num_more=num_more)

    def load(self, layout: Any = None) -> Tensor:
        memory, lines, thread = self.memory, self.lines, this_thread()
        self._check_written()
        numbers = memory.numbers[lines]
        if memory.has_stores:
            is_doubted = ~self._is_known(memory.stored[:, lines])
            memory.doubted[thread.own, lines] |= is_doubted
            if self.dtype.is_floating_point:
                numbers = numbers.masked_fill(is_doubted[:, None], torch.nan)
        memory.loaded[thread.own, lines] = thread.now
        return self._from_lines(numbers).to(self.dtype)

    def store(self, value: Tensor) -> None:
        memory, lines, thread = self.memory, self.lines, this_thread()
        assert value.dtype is self.dtype
        numbers = self._as_lines(value)
        assert thread.knows(memory.copied[:, lines]), "stored while a copy is under way"
        stored = memory.stored[:, lines]
        is_new = (memory.numbers[lines] != numbers).any(1)
        multiplied, loaded = memory.multiplied[:, lines], memory.loaded[:, lines]
        assert thread.knows(multiplied[:, is_new]), "stored while a product reads it"
        assert thread.knows(stored[:, is_new]), "two threads store different numbers"
        memory.doubted[:, lines] |= (loaded > thread.clock[:, None]) & is_new
        memory.doubted[thread.own, lines] = False
        is_confirmed = (stored[thread.own] == 0) & (stored != 0).any(0)
        stored[:, is_new] = 0
        stored[thread.own, is_new | is_confirmed] = thread.now
        memory.numbers[lines] = numbers
        memory.is_written[lines] = memory.has_stores = True

    def copy(self, box: Tensor, barrier: Barrier) -> None:
        """Under way from now on until the barrier's phase is over."""
        memory, lines, thread = self.memory, self.lines, this_thread()
        assert (box.dtype, list(box.shape)) == (self.dtype, list(self.shape))
        numbers = self._as_lines(box)
        for times in (memory.copied, memory.multiplied, memory.loaded, memory.stored):
            assert thread.knows(times[:, lines]), "a copy overwrites what is still used"
        if memory.has_stores:
            assert not memory.unfenced(lines).any(), "a copy overwrites what isn't fenced"
            memory.stored[:, lines] = 0
        memory.numbers[lines] = numbers
        memory.is_written[lines] = True
        memory.copied[:, lines] = 0
        memory.copied[barrier.own, lines] = barrier.num_phases + 1
        barrier.change(0, -box.numel() * box.element_size())

    def use(self) -> None:
        """At the start and at the end of a product."""
        memory, lines, thread = self.memory, self.lines, this_thread()
        self._check_written()
        if memory.has_stores:
            fenced = memory.stored[:, lines].masked_fill(memory.unfenced(lines), NEVER)
            assert self._is_known(fenced).all(), "a product reads what isn't stored and fenced"
        memory.multiplied[thread.own, lines] = thread.now

    def multiplied(self) -> Tensor:
        self.use()
        numbers = self._from_lines(self.memory.numbers[self.lines])
        if self.num_more:
            unknown = torch.full((self.num_more, *self.shape[1:]), torch.nan)
            numbers = torch.cat((numbers, unknown))
        return numbers if self.order is None else numbers.permute(*self.order)

    def _as_lines(self, value: Tensor) -> Tensor:
        assert self.order is None
        line = self.memory.numbers.shape[1]
        columns = value.expand(*self.shape).reshape(-1, self.shape[-1] // line, line)
        return columns.transpose(0, 1).reshape(-1, line).to(self.memory.numbers.dtype)

    def _from_lines(self, lines: Tensor) -> Tensor:
        num_columns = self.shape[-1] // lines.shape[1]
        return lines.unflatten(0, (num_columns, -1)).transpose(0, 1).reshape(*self.shape)

    def _check_written(self) -> None:
        memory, lines = self.memory, self.lines
        assert memory.is_written[lines].all(), "read, but not written yet"
        assert this_thread().knows(memory.copied[:, lines]), "read while a copy is under way"

    def _is_known(self, stored: Tensor) -> Tensor:
        """Whether this thread knows, of each line, of one who stored what is there, if any did."""
        is_known = (stored != 0) & (stored <= this_thread().clock[:, None])
        return is_known.any(0) | ~(stored != 0).any(0)


@dataclass(frozen=True)
class Buffers:
    memory: Memory
    shape: Sequence[int]
    layout: Any = None

    def __post_init__(self) -> None:
        # Lines are swizzled in eights, which doesn't show as long as no view divides them.
        is_swizzled = self.memory.numbers.shape[1] > 1
        assert not is_swizzled or prod(self.shape[1:-1]) % 8 == 0

    @staticmethod
    def allocate(dtype: torch.dtype, shape: Sequence[int], layout: Any) -> "Buffers":
        line = _line(layout)
        return Buffers(
            Memory(this_thread().program, dtype, prod(shape) // line, line), shape, layout
        )

    @property
    def dtype(self) -> torch.dtype:
        return self.memory.dtype

    def index(self, i: Any) -> Buffer:
        assert 0 <= i < self.shape[0]
        num = len(self.memory.numbers) // self.shape[0]
        return Buffer(self.memory, slice(int(i) * num, int(i + 1) * num), self.shape[1:])

    def _reinterpret(self, dtype: torch.dtype, shape: Sequence[int], layout: Any) -> "Buffers":
        line = self.memory.numbers.shape[1]
        assert (dtype, prod(shape), _line(layout)) == (self.dtype, prod(self.shape), line)
        return Buffers(self.memory, shape, layout)


def _line(layout: Any) -> int:
    """Numbers of a line."""
    if not isinstance(layout, NVMMASharedLayout):
        return 1
    assert layout.swizzle_byte_width == LINE_BYTES
    return LINE_BYTES * 8 // layout.element_bitwidth
