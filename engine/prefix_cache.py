"""Which blocks hold which content, and in which order unreferenced ones are given up.

Registered blocks form trees by chained hash. Two orders hold at all times:

- A block is registered only while its predecessor is, so a prefix is present up to one point and
  absent after it; whoever loses its predecessor is unregistered with it.
- Among the *idle* blocks (registered, no reference), a block stands before its idle predecessor,
  so taking the oldest takes leaves first.
"""

from collections import OrderedDict
from collections.abc import Sequence

from engine.kv_events import KVEventLog
from protocol.block_hash import BlockHash
from protocol.records import BlocksStored, KVEvent


class PrefixCache:
    """Index and LRU order of registered blocks. All single-block operations are O(1).

    Children are kept as intrusive sibling lists, so 100,000 blocks cost no 100,000 containers.
    """

    def __init__(self, num_blocks: int) -> None:
        self._block_of: dict[BlockHash, int] = {}
        self._hash_of: list[BlockHash | None] = [None] * num_blocks
        self._parent_hash_of: list[BlockHash | None] = [None] * num_blocks
        self._first_child: list[int | None] = [None] * num_blocks
        self._next_sibling: list[int | None] = [None] * num_blocks
        self._previous_sibling: list[int | None] = [None] * num_blocks
        self._idle: OrderedDict[int, None] = OrderedDict()
        self._events = KVEventLog(max_pending_hashes=4 * num_blocks + 1024)

    @property
    def num_idle_blocks(self) -> int:
        return len(self._idle)

    @property
    def num_registered_blocks(self) -> int:
        return len(self._block_of)

    def is_registered(self, block_id: int) -> bool:
        return self._hash_of[block_id] is not None

    def idle_blocks(self) -> list[int]:
        """Idle blocks, the next to be evicted first."""
        return list(self._idle)

    def predecessor(self, block_id: int) -> int | None:
        """The registered block before this registered one; None for a sequence's first."""
        parent_hash = self._parent_hash_of[block_id]
        return None if parent_hash is None else self._block_of.get(parent_hash)

    def find(self, hashes: Sequence[BlockHash]) -> list[int]:
        """Blocks of the longest registered prefix of `hashes`."""
        found: list[int] = []
        block_of = self._block_of
        for block_hash in hashes:
            block_id = block_of.get(block_hash)
            if block_id is None:
                break
            found.append(block_id)
        return found

    def insert(
        self, block_id: int, block_hash: BlockHash, parent_hash: BlockHash, *, is_first: bool
    ) -> bool:
        """Registers a referenced block; False if its content is here or its predecessor isn't.

        `is_first` says that `parent_hash` is a root, which no block stands for.
        """
        parent = None if is_first else self._block_of.get(parent_hash)
        if block_hash in self._block_of or (parent is None and not is_first):
            return False
        self._block_of[block_hash] = block_id
        self._hash_of[block_id] = block_hash
        self._parent_hash_of[block_id] = parent_hash
        if parent is not None:
            sibling = self._first_child[parent]
            self._next_sibling[block_id] = sibling
            if sibling is not None:
                self._previous_sibling[sibling] = block_id
            self._first_child[parent] = block_id
        self._events.stored(parent_hash, block_hash)
        return True

    def retire(self, block_id: int) -> bool:
        """The block lost its last reference: keep it as the youngest idle block if registered.

        Idle predecessors move behind it. There are some only if its holder didn't hold them:
        it computed them a second time, or pinned this block alone.
        """
        if self._hash_of[block_id] is None:
            return False
        idle = self._idle
        idle[block_id] = None
        ancestor = self.predecessor(block_id)
        while ancestor is not None and ancestor in idle:
            idle.move_to_end(ancestor)
            ancestor = self.predecessor(ancestor)
        return True

    def revive(self, block_id: int) -> None:
        """An idle block is referenced again."""
        del self._idle[block_id]

    def evict(self) -> list[int]:
        """Unregisters the oldest idle block; returns the blocks that are free by that.

        It has descendants only where a referenced one depends on it (see `retire`). They are
        unregistered too: referenced ones turn private, idle ones are free.
        """
        block_id, _ = self._idle.popitem(last=False)
        freed = [block_id]
        if self._first_child[block_id] is not None:
            for descendant in self._descendants_leaves_first(block_id):
                self._unregister(descendant)
                if descendant in self._idle:
                    del self._idle[descendant]
                    freed.append(descendant)
        self._unregister(block_id)
        return freed

    def clear(self) -> list[int]:
        """Unregisters everything; returns the blocks that were idle and are free now."""
        freed = list(self._idle)
        self._idle.clear()
        for block_id in self._block_of.values():
            self._hash_of[block_id] = None
            self._parent_hash_of[block_id] = None
            self._first_child[block_id] = None
            self._next_sibling[block_id] = None
            self._previous_sibling[block_id] = None
        self._block_of.clear()
        self._events.cleared()
        return freed

    def drain_events(self) -> list[KVEvent]:
        return self._events.drain(self.snapshot)

    def snapshot(self) -> list[BlocksStored]:
        """The whole content as events, predecessors first, one for each unbranched chain."""
        chains: list[BlocksStored] = []
        starts = [block for block in self._block_of.values() if self.predecessor(block) is None]
        while starts:
            block: int | None = starts.pop()
            parent_hash = self._parent_hash_of[block]
            assert parent_hash is not None
            chain = BlocksStored(parent_hash, [])
            chains.append(chain)
            while block is not None:
                chain.hashes.append(self._hash(block))
                first, *others = self._children(block) or [None]
                starts.extend(child for child in others if child is not None)
                block = first
        return chains

    def _hash(self, block_id: int) -> BlockHash:
        block_hash = self._hash_of[block_id]
        assert block_hash is not None, f"block {block_id} is not registered"
        return block_hash

    def _children(self, block_id: int) -> list[int]:
        children: list[int] = []
        child = self._first_child[block_id]
        while child is not None:
            children.append(child)
            child = self._next_sibling[child]
        return children

    def _descendants_leaves_first(self, block_id: int) -> list[int]:
        found: list[int] = []
        stack = self._children(block_id)
        while stack:
            block = stack.pop()
            found.append(block)
            stack.extend(self._children(block))
        found.reverse()
        return found

    def _unregister(self, block_id: int) -> None:
        """Takes a block without registered children out of the index and its parent's list."""
        block_hash = self._hash(block_id)
        parent = self.predecessor(block_id)
        previous = self._previous_sibling[block_id]
        following = self._next_sibling[block_id]
        if previous is not None:
            self._next_sibling[previous] = following
        elif parent is not None:
            self._first_child[parent] = following
        if following is not None:
            self._previous_sibling[following] = previous
        self._next_sibling[block_id] = None
        self._previous_sibling[block_id] = None
        self._hash_of[block_id] = None
        self._parent_hash_of[block_id] = None
        del self._block_of[block_hash]
        self._events.removed(block_hash)
