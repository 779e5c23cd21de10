"""A region that peers read by themselves, as on GPUs, in host memory of one process."""

import itertools
import threading
import time
from collections import deque
from dataclasses import dataclass, field

from kvtransfer import KVRegion
from kvtransfer.block_ids import BlockIds

COPY_S = 0.002
_regions: dict[bytes, "MappedRegion"] = {}
_numbers = itertools.count()


class MappedRegion(KVRegion):
    """Its `export` is a name; a copy of its blocks takes a while, on the thread that waits."""

    def export(self) -> bytes:
        name = b"region-%d" % next(_numbers)
        _regions[name] = self
        return name

    def map(self, exported: bytes) -> "MappedPool":
        return MappedPool(_regions[exported], self)


@dataclass
class MappedPool:
    source: MappedRegion
    target: MappedRegion
    is_closed: bool = False
    open_copies: deque["MappedCopy"] = field(default_factory=deque["MappedCopy"])
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def num_blocks(self) -> int:
        return self.source.num_blocks

    def start_copy(self, source_ids: BlockIds, target_ids: BlockIds) -> "MappedCopy":
        return self._start(list(zip(source_ids.tolist(), target_ids.tolist(), strict=True)))

    def start_trial(self, num_blocks: int) -> "MappedCopy":
        assert 0 < num_blocks <= self.num_blocks
        return self._start([])

    def close(self) -> None:
        assert not self.open_copies, "copies end before the mapping does"
        self.is_closed = True

    def _start(self, pairs: list[tuple[int, int]]) -> "MappedCopy":
        copy = MappedCopy(self, pairs)
        self.open_copies.append(copy)
        return copy


@dataclass
class MappedCopy:
    pool: MappedPool
    pairs: list[tuple[int, int]]
    is_done: bool = False

    def wait(self) -> None:
        """Makes this copy, and all that were started before."""
        with self.pool.lock:
            while not self.is_done:
                self.pool.open_copies.popleft().make()

    def make(self) -> None:
        assert not self.pool.is_closed
        time.sleep(COPY_S)
        for source_id, target_id in self.pairs:
            self.pool.target.view((target_id, 1))[:] = self.pool.source.view((source_id, 1))
        self.is_done = True
