"""Who holds which KV block. Every block is in exactly one of four states:

    free --allocate--> referenced --free--> cached (registered) or free
      ^                    |  ^                 |
      |                    |  +--match_prefix---+--evicted by allocate--> free
      +--release_quarantine-- quarantined <--quarantine-- referenced

Not thread-safe: the engine thread alone touches it.
"""

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from engine.prefix_cache import PrefixCache
from protocol.block_hash import BlockHash
from protocol.records import BlocksStored, KVEvent


class BlockOwnershipError(RuntimeError):
    """Someone freed, pinned or registered a block that it doesn't hold: a bug of ours."""


@dataclass(frozen=True, slots=True)
class BlockCounts:
    """How many blocks are in each state."""

    free: int
    referenced: int
    cached: int
    quarantined: int
    total: int


class BlockPool:
    """Hands out blocks of `block_size` tokens, counts references, keeps unreferenced content.

    Cached blocks are as good as free ones to `allocate`: it evicts them, the least recently used
    first and leaves before their predecessors. Free blocks are a stack to which sequences return
    tail first, so that a large allocation mostly finds runs of neighbours, which a transfer can
    send as one message.
    """

    def __init__(
        self, num_blocks: int, block_size: int, *, enable_prefix_caching: bool = True
    ) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.enable_prefix_caching = enable_prefix_caching
        self._free = list(range(num_blocks - 1, -1, -1))
        self._num_references = [0] * num_blocks
        self._num_referenced_blocks = 0
        self._quarantined: set[int] = set()
        self._cache = PrefixCache(num_blocks)

    @property
    def num_available_blocks(self) -> int:
        """What `allocate` could hand out now: free and cached blocks."""
        return len(self._free) + self._cache.num_idle_blocks

    @property
    def counts(self) -> BlockCounts:
        return BlockCounts(
            free=len(self._free),
            referenced=self._num_referenced_blocks,
            cached=self._cache.num_idle_blocks,
            quarantined=len(self._quarantined),
            total=self.num_blocks,
        )

    def num_blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold `num_tokens` tokens."""
        return -(-num_tokens // self.block_size)

    def num_references(self, block_id: int) -> int:
        return self._num_references[block_id]

    def allocate(self, num_blocks: int) -> list[int] | None:
        """`num_blocks` blocks with one reference each, ascending; None if there aren't as many."""
        free = self._free
        if num_blocks > len(free) + self._cache.num_idle_blocks:
            return None
        if num_blocks == 0:
            return []
        while len(free) < num_blocks:
            free.extend(self._cache.evict())
        block_ids = free[-num_blocks:]
        del free[-num_blocks:]
        block_ids.sort()
        for block_id in block_ids:
            self._num_references[block_id] = 1
        self._num_referenced_blocks += num_blocks
        return block_ids

    def pin(self, block_ids: Sequence[int]) -> None:
        """One more reference on each of these referenced blocks; `free` takes it off again."""
        for block_id in block_ids:
            if self._num_references[block_id] < 1:
                raise BlockOwnershipError(f"block {block_id} is pinned, but nobody holds it")
        for block_id in block_ids:
            self._num_references[block_id] += 1

    @contextmanager
    def pinned(self, block_ids: Sequence[int]) -> Generator[None, None, None]:
        """Holds the blocks while something else than their sequence reads them."""
        block_ids = list(block_ids)
        self.pin(block_ids)
        try:
            yield
        finally:
            self.free(block_ids)

    def free(self, block_ids: Sequence[int]) -> None:
        """Takes one reference off each; give them in the sequence's order.

        Raises BlockOwnershipError for a block that has no reference left.
        """
        references = self._num_references
        # From the tail: leaves become the older ones as they are, with no predecessor to move.
        for block_id in reversed(block_ids):
            count = references[block_id]
            if count < 1:
                raise BlockOwnershipError(f"block {block_id} is freed, but nobody holds it")
            references[block_id] = count - 1
            if count == 1:
                self._num_referenced_blocks -= 1
                if not self._cache.retire(block_id):
                    self._free.append(block_id)

    def num_prefix_blocks(self, hashes: Sequence[BlockHash]) -> int:
        """Length of the prefix that `match_prefix` would find; changes nothing."""
        return len(self._cache.find(hashes))

    def match_prefix(self, hashes: Sequence[BlockHash]) -> list[int]:
        """Blocks of the longest cached prefix, each with one more reference for the caller."""
        block_ids = self._cache.find(hashes)
        for block_id in block_ids:
            if self._num_references[block_id] == 0:
                self._cache.revive(block_id)
                self._num_referenced_blocks += 1
            self._num_references[block_id] += 1
        return block_ids

    def register(
        self,
        block_ids: Sequence[int],
        hashes: Sequence[BlockHash],
        *,
        root: BlockHash,
        first: int = 0,
    ) -> None:
        """Makes a sequence's full blocks from number `first` on findable: `hashes[i]` names
        `block_ids[i]`, `root` precedes block 0.

        A block whose content is registered already stays private to its holder, and so does one
        whose predecessor isn't registered (any more).
        """
        if not self.enable_prefix_caching:
            return
        for i in range(first, len(hashes)):
            block_id = block_ids[i]
            if self._num_references[block_id] < 1:
                raise BlockOwnershipError(f"block {block_id} is registered, but nobody holds it")
            if not self._cache.is_registered(block_id):
                parent = hashes[i - 1] if i else root
                self._cache.insert(block_id, hashes[i], parent, is_first=i == 0)

    def quarantine(self, block_ids: Sequence[int]) -> None:
        """Takes the caller's own, never registered blocks out of use: someone may still write."""
        for block_id in block_ids:
            if self._num_references[block_id] != 1 or self._cache.is_registered(block_id):
                raise BlockOwnershipError(f"block {block_id} isn't its quarantiner's alone")
        for block_id in block_ids:
            self._num_references[block_id] = 0
        self._num_referenced_blocks -= len(block_ids)
        self._quarantined.update(block_ids)

    def release_quarantine(self, block_ids: Sequence[int]) -> None:
        """Nobody writes to these blocks any more: they are free."""
        if not self._quarantined.issuperset(block_ids):
            strangers = sorted(set(block_ids) - self._quarantined)
            raise BlockOwnershipError(f"blocks {strangers} are not in quarantine")
        self._quarantined.difference_update(block_ids)
        self._free.extend(reversed(block_ids))

    def reset_cache(self) -> int:
        """Forgets all content. Blocks in use stay with their holders, but can't be hit.

        Returns how many blocks are free by that.
        """
        freed = self._cache.clear()
        self._free.extend(freed)
        return len(freed)

    def drain_events(self) -> list[KVEvent]:
        """Changes of the prefix cache since the last call, in order."""
        return self._cache.drain_events()

    def snapshot(self) -> list[BlocksStored]:
        """The prefix cache's whole content as events, predecessors first."""
        return self._cache.snapshot()

    def check_integrity(self) -> None:
        """Raises BlockOwnershipError unless every block is in exactly one state. O(num_blocks)."""
        free, idle = set(self._free), self._cache.idle_blocks()
        referenced = {i for i, count in enumerate(self._num_references) if count > 0}
        states = (free, referenced, set(idle), self._quarantined)
        counts = self.counts
        is_partition = len(set[int]().union(*states)) == sum(map(len, states)) == self.num_blocks
        if (
            not is_partition
            or len(free) != counts.free
            or len(referenced) != counts.referenced
            or min(self._num_references, default=0) < 0
        ):
            raise BlockOwnershipError(
                f"{counts.free} free + {counts.referenced} referenced + {counts.cached} cached + "
                f"{counts.quarantined} quarantined blocks don't add up to {counts.total}"
            )
        position = {block_id: i for i, block_id in enumerate(idle)}
        for block_id in idle:
            ancestor = self._cache.predecessor(block_id)
            if ancestor in position and position[ancestor] < position[block_id]:
                raise BlockOwnershipError(f"block {ancestor} would go before its successor")
