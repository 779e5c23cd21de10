"""How many prompt tokens fill the tiles that a device computes a step in.

A GPU's matrix products run in tiles of tokens, and a tile that a few tokens begin costs nearly as
much as a full one (benchmarks/gpu/products.py). So where sequences decode, which is where another
step follows anyway, what begins a tile and hardly fills it waits for that step.
"""

from bisect import bisect_left
from dataclasses import dataclass

# A tile filled less than this isn't worth beginning: its tokens cost the next step less.
_WORTHWHILE_SHARE = 0.25
# Of so many tiles on, the product's time goes up by tiles.
_MIN_TILES = 2


@dataclass(frozen=True, slots=True)
class StepTiles:
    """Tiles of `num_tokens`; a step's decoding sequences are padded to the next of `paddings`,
    which ascend, and not beyond the last."""

    num_tokens: int
    paddings: tuple[int, ...] = ()

    def worthwhile(self, num_decodes: int, num_prompt_tokens: int) -> int:
        """How many of its prompt tokens a step with `num_decodes` decoding sequences had better
        compute."""
        at = bisect_left(self.paddings, num_decodes)
        num_padded = self.paddings[at] if at < len(self.paddings) else num_decodes
        num_tiles, excess = divmod(num_padded + num_prompt_tokens, self.num_tokens)
        is_waste = num_tiles >= _MIN_TILES and excess <= _WORTHWHILE_SHARE * self.num_tokens
        return num_prompt_tokens - excess if is_waste else num_prompt_tokens
