"""How Hopper's products are cut into programs."""

from dataclasses import dataclass, replace

# A multiprocessor's registers, what a thread can have of them, and how they are handed out.
_REGISTERS = 65536
_MOST_REGISTERS = 240
_REGISTER_STEP = 8
_WARPGROUP_THREADS = 128
_LEAST_STAGES = 2
_MOST_WARPGROUPS = 3
LOADING_REGISTERS = 24
# As in `kernels.gpu.linear_tiles`.
_MANY_ROWS = 16384
_LONG_ROWS, _VOCABULARY_ROWS = 8192, 65536


@dataclass(frozen=True, slots=True)
class HopperTile:
    """The tile of a program: `warpgroups` times `rows` by `columns`, `inner_bytes` of each a step.

    Rows are tokens, or output channels; columns the other. `splits` units share a tile's sum, and
    `merged` of them at a time are added up. After `promoted` steps the tensor cores' short sums
    (about 14 bits) are added up in float32, at the price of as many registers again; 0 is never.
    `programs` run on a multiprocessor at once.
    """

    tokens_are_rows: bool = True
    rows: int = 64
    columns: int = 128
    warpgroups: int = 2
    inner_bytes: int = 128
    stages: int = 4
    splits: int = 1
    merged: int = 2
    promoted: int = 0
    programs: int = 1

    def __post_init__(self) -> None:
        if self.stages < _LEAST_STAGES:
            raise ValueError("a stage is freed once the next one is multiplied: it takes two")
        if not 1 <= self.warpgroups <= _MOST_WARPGROUPS:
            raise ValueError(f"there is no kernel of {self.warpgroups} warpgroups")
        if self.merged < 2:
            raise ValueError("it takes two to merge")

    @property
    def tokens(self) -> int:
        return self.rows * self.warpgroups if self.tokens_are_rows else self.columns

    @property
    def features(self) -> int:
        return self.columns if self.tokens_are_rows else self.rows * self.warpgroups

    @property
    def shared_bytes(self) -> int:
        """Of a program's stages, without what it stores results through."""
        return self.stages * self.inner_bytes * (self.rows * self.warpgroups + self.columns)

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


# What measured fastest on an H100 (benchmarks/gpu/hopper_linear.py), by the most tokens it is for:
# of layers with many outputs, and of others, in one part or two.
_WIDE = {
    128: HopperTile(tokens_are_rows=False, stages=6),
    192: HopperTile(warpgroups=3, stages=5),
    256: HopperTile(columns=256, stages=4),
}
_WHOLE = {
    128: HopperTile(columns=64, stages=8),
    192: HopperTile(warpgroups=3, columns=64, stages=6),
}
_SPLIT = {tokens: replace(tile, splits=2) for tokens, tile in _WHOLE.items()} | {
    256: HopperTile(rows=128, columns=64, stages=5, splits=2)
}


# The same for 16 bits, by the least and the most tokens; 72, 128, 192 and 256 were measured, and
# outputs up to a gate's and up's.
_WIDE_16 = {(65, 112): HopperTile(tokens_are_rows=False, rows=128)}
_LONG_16 = {
    (97, 128): HopperTile(columns=64, stages=8, splits=2),
    (129, 192): HopperTile(warpgroups=3, columns=64, stages=6, splits=2),
}


def token_counts() -> list[int]:
    """Numbers of tokens whose products, of all layers, have all of these tiles."""
    most = {tokens for tiles in (_WIDE, _WHOLE, _SPLIT) for tokens in tiles}
    return sorted(most | {tokens for tiles in (_WIDE_16, _LONG_16) for _, tokens in tiles})


def tile_for_16_bits(num_tokens: int, out_features: int, in_features: int) -> HopperTile | None:
    """`tile_for` operands of 16 bits."""
    tiles: dict[tuple[int, int], HopperTile] = {}
    if _MANY_ROWS <= out_features < _VOCABULARY_ROWS:
        tiles = _WIDE_16
    elif in_features >= _LONG_ROWS:
        tiles = _LONG_16
    return next(
        (tile for (least, most), tile in tiles.items() if least <= num_tokens <= most), None
    )


def tile_for(num_tokens: int, out_features: int, in_features: int) -> HopperTile | None:
    """The tile for a product of 8-bit numbers of this shape; None where torch's is faster."""
    tiles = _WHOLE
    if out_features >= _MANY_ROWS:
        tiles = _WIDE
    elif out_features <= in_features:
        tiles = _SPLIT
    return next((tile for tokens, tile in tiles.items() if num_tokens <= tokens), None)


def _rounded(registers: int) -> int:
    return registers // _REGISTER_STEP * _REGISTER_STEP
