"""How Hopper's product of 8-bit numbers is cut into programs."""

from dataclasses import dataclass

# A multiprocessor's registers, what a thread can have of them, and how they are handed out.
_REGISTERS = 65536
_MOST_REGISTERS = 240
_REGISTER_STEP = 8
_WARPGROUP_THREADS = 128
LOADING_REGISTERS = 24


@dataclass(frozen=True, slots=True)
class HopperTile:
    """The tile of a program: `warpgroups` times `rows` by `columns`, `inner` elements a step.

    Rows are tokens, or output channels; columns the other. `splits` units share a tile's sum.
    After `promoted` steps the tensor cores' short sums (about 14 bits) are added up in float32, at
    the price of as many registers again; 0 is never. `programs` run on a multiprocessor at once.
    """

    tokens_are_rows: bool = True
    rows: int = 64
    columns: int = 128
    warpgroups: int = 2
    inner: int = 128
    stages: int = 4
    splits: int = 1
    promoted: int = 0
    programs: int = 1

    @property
    def tokens(self) -> int:
        return self.rows * self.warpgroups if self.tokens_are_rows else self.columns

    @property
    def features(self) -> int:
        return self.columns if self.tokens_are_rows else self.rows * self.warpgroups

    @property
    def registers(self) -> int:
        """Of a thread when a program starts. The warp that loads stands for a whole warpgroup."""
        threads = (self.warpgroups + 1) * self.programs * _WARPGROUP_THREADS
        return _rounded(min(_REGISTERS // threads, _MOST_REGISTERS))

    @property
    def multiplying_registers(self) -> int:
        """Of a thread that multiplies, once the loading warp has given up most of its own."""
        shared = self.registers * (self.warpgroups + 1) - LOADING_REGISTERS
        return _rounded(min(shared // self.warpgroups, _MOST_REGISTERS))


def _rounded(registers: int) -> int:
    return registers // _REGISTER_STEP * _REGISTER_STEP
