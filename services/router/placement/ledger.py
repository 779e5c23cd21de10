"""Work that routers have placed and workers haven't reported yet.

A load report is up to a few hundred milliseconds old; without this account every request of a
burst would go to the worker that was idle in the last one. An amount is entered when a request is
placed and leaves when a report must contain it:

- on the prefill worker, or on decode for local prefill: the first report after the request got
  there, which is `settle_s` after it was placed;
- on a decode worker that waits for KV: the first such report after the prompt was computed.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import msgspec

from protocol.ids import RequestKey, RouterId, WorkerId


class PlacedWork(msgspec.Struct, frozen=True, array_like=True):
    """Amounts on one worker."""

    num_prefill_tokens: int = 0
    num_sequences: int = 0
    num_blocks: int = 0

    def __add__(self, other: "PlacedWork") -> "PlacedWork":
        return PlacedWork(
            self.num_prefill_tokens + other.num_prefill_tokens,
            self.num_sequences + other.num_sequences,
            self.num_blocks + other.num_blocks,
        )

    def __sub__(self, other: "PlacedWork") -> "PlacedWork":
        return PlacedWork(
            self.num_prefill_tokens - other.num_prefill_tokens,
            self.num_sequences - other.num_sequences,
            self.num_blocks - other.num_blocks,
        )


NO_WORK = PlacedWork()


@dataclass(slots=True)
class _Entry:
    work: PlacedWork
    on_its_way_s: float | None  # None: it will be, when its prompt is computed


@dataclass(slots=True)
class _Foreign:
    works: Mapping[WorkerId, PlacedWork]
    expires_s: float


class PlacementLedger:
    """This router's placements by request, the other routers' as sums that they tell."""

    def __init__(
        self,
        *,
        settle_s: float = 0.1,
        foreign_ttl_s: float = 1.5,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._settle_s = settle_s
        self._foreign_ttl_s = foreign_ttl_s
        self._clock = clock
        self._entries: dict[WorkerId, dict[RequestKey, _Entry]] = {}
        self._sums: dict[WorkerId, PlacedWork] = {}
        self._places: dict[RequestKey, tuple[WorkerId, ...]] = {}
        self._foreign: dict[RouterId, _Foreign] = {}

    def pending(self, worker_id: WorkerId) -> PlacedWork:
        """What comes on top of the worker's last report."""
        work = self._sums.get(worker_id, NO_WORK)
        now_s = self._clock()
        for foreign in self._foreign.values():
            if foreign.expires_s > now_s and worker_id in foreign.works:
                work += foreign.works[worker_id]
        return work

    @property
    def own(self) -> dict[WorkerId, PlacedWork]:
        """This router's sums, for the other routers."""
        return dict(self._sums)

    def placed(
        self,
        key: RequestKey,
        *,
        prefill: WorkerId | None,
        decode: WorkerId,
        num_prefill_tokens: int,
        num_blocks: int,
    ) -> None:
        """The request leaves for its workers now; `prefill` None means local prefill."""
        now_s = self._clock()
        if prefill is None:
            self._enter(decode, key, _Entry(PlacedWork(num_prefill_tokens, 1, num_blocks), now_s))
            self._places[key] = (decode,)
        else:
            self._enter(prefill, key, _Entry(PlacedWork(num_prefill_tokens, 1, 0), now_s))
            self._enter(decode, key, _Entry(PlacedWork(0, 1, num_blocks), None))
            self._places[key] = (prefill, decode)

    def prefilled(self, key: RequestKey) -> None:
        """The first token came: decode has the request now, or will in a moment."""
        for worker_id in self._places.get(key, ()):
            entry = self._entries.get(worker_id, {}).get(key)
            if entry is not None and entry.on_its_way_s is None:
                entry.on_its_way_s = self._clock()

    def ended(self, key: RequestKey) -> None:
        """Nothing of the request is on a worker any more."""
        for worker_id in self._places.pop(key, ()):
            self._leave(worker_id, key)

    def reported(self, worker_id: WorkerId) -> None:
        """A load report of the worker has come: what got there before it is in it."""
        reached_before_s = self._clock() - self._settle_s
        for key, entry in list(self._entries.get(worker_id, {}).items()):
            if entry.on_its_way_s is not None and entry.on_its_way_s <= reached_before_s:
                self._leave(worker_id, key)

    def worker_lost(self, worker_id: WorkerId) -> None:
        self._entries.pop(worker_id, None)
        self._sums.pop(worker_id, None)

    def others_placed(self, router_id: RouterId, works: Mapping[WorkerId, PlacedWork]) -> None:
        """Another router's sums; they hold until its next ones, or `foreign_ttl_s`."""
        now_s = self._clock()
        self._foreign = {r: f for r, f in self._foreign.items() if f.expires_s > now_s}
        self._foreign[router_id] = _Foreign(works, now_s + self._foreign_ttl_s)

    def _enter(self, worker_id: WorkerId, key: RequestKey, entry: _Entry) -> None:
        self._entries.setdefault(worker_id, {})[key] = entry
        self._sums[worker_id] = self._sums.get(worker_id, NO_WORK) + entry.work

    def _leave(self, worker_id: WorkerId, key: RequestKey) -> None:
        entries = self._entries.get(worker_id, {})
        entry = entries.pop(key, None)
        if entry is None:
            return
        if entries:
            self._sums[worker_id] -= entry.work
        else:
            del self._entries[worker_id], self._sums[worker_id]
