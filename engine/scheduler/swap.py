"""Where the KV of preempted sequences stays in host memory, and what has to be copied for that.

1. `put`, when a sequence is preempted: its computed tokens get host blocks, if there are as many;
   else it's computed anew.
2. `take`, when it has blocks on the device again: what the prefix cache hasn't kept comes back.
3. `drop`, when it's aborted meanwhile.

The copies are part of a step's plan and done before anything else of it, in order: so blocks may
be handed on, at either end, as soon as their copy is planned.
"""

from dataclasses import dataclass, field

from engine.sequence import Sequence


@dataclass(slots=True)
class BlockCopies:
    """(block of the pool, block in host memory) pairs: first those that leave, then those that
    come back."""

    out: list[tuple[int, int]] = field(default_factory=list[tuple[int, int]])
    back: list[tuple[int, int]] = field(default_factory=list[tuple[int, int]])

    def __bool__(self) -> bool:
        return bool(self.out or self.back)


class SwapSpace:
    """The books over `num_blocks` blocks of host memory; not thread-safe."""

    def __init__(self, num_blocks: int) -> None:
        self._free = list(range(num_blocks - 1, -1, -1))
        self._held: dict[Sequence, list[int]] = {}
        self._copies = BlockCopies()

    def __contains__(self, sequence: Sequence) -> bool:
        return sequence in self._held

    def __len__(self) -> int:
        """Sequences that are here."""
        return len(self._held)

    @property
    def num_free_blocks(self) -> int:
        return len(self._free)

    def put(self, sequence: Sequence, num_blocks: int) -> bool:
        """Plans to copy the sequence's first `num_blocks` blocks; false if there is no room."""
        if num_blocks > len(self._free):
            return False
        # The stack's end in reverse: mostly ascending, so that copies are long.
        held = self._free[: -num_blocks - 1 : -1]
        del self._free[-num_blocks:]
        self._held[sequence] = held
        self._copies.out += zip(sequence.block_ids, held, strict=False)
        return True

    def take(self, sequence: Sequence, num_cached_blocks: int) -> None:
        """Plans to copy what is here to the sequence's new blocks, but for the first
        `num_cached_blocks`, which hold it already."""
        held = self._held[sequence]
        blocks = zip(sequence.block_ids, held, strict=False)
        self._copies.back += list(blocks)[num_cached_blocks:]
        self.drop(sequence)

    def drop(self, sequence: Sequence) -> None:
        """Forgets what is here of it."""
        self._free += reversed(self._held.pop(sequence))

    def drain(self) -> BlockCopies:
        """What was planned since the last call."""
        copies, self._copies = self._copies, BlockCopies()
        return copies
