"""The workers as this router sees them: who can take work, and who gets the next request."""

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from protocol.block_hash import BlockHash, hash_blocks
from protocol.ids import RequestKey, WorkerId, WorkerRole
from protocol.records import WorkerLoad, WorkerRecord
from protocol.request import Request
from services.router.dispatch import Route
from services.router.served_model import ServedModel
from services.runtime.channel import ControlChannel
from services.runtime.directory import Records
from services.runtime.peers import Peer, PeerState

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class _Worker:
    record: WorkerRecord
    peer: Peer
    load: WorkerLoad = field(default_factory=WorkerLoad)
    placed: set[RequestKey] = field(default_factory=set[RequestKey])

    @property
    def is_ready(self) -> bool:
        return self.peer.state is PeerState.ALIVE and not self.load.draining


class Cluster:
    """Follows the directory, keeps a connection to every worker, chooses routes."""

    def __init__(
        self, channel: ControlChannel, model: ServedModel, *, on_placed: Callable[[str], None]
    ) -> None:
        self._channel = channel
        self._model = model
        self._on_placed = on_placed
        self._workers: dict[WorkerId, _Worker] = {}
        self._routes: dict[RequestKey, Route] = {}

    def records_came(self, records: Records) -> None:
        """What Redis says now. A worker that is missing there but connected here is kept."""
        for worker_id, record in records.items():
            known = self._workers.get(worker_id)
            if known is not None and known.record.ref == record.ref and not known.peer.is_lost:
                continue
            if known is not None and not known.peer.is_lost:
                self._channel.disconnect(known.record.ref)
            self._workers[worker_id] = _Worker(record, self._channel.connect(record.ref))
            self._model.adopt_worker(
                fingerprint=record.layout.model_fingerprint, max_model_len=record.max_model_len
            )

    def load_came(self, peer: Peer, load: WorkerLoad) -> None:
        worker = self._workers.get(peer.peer_id)
        if worker is not None and worker.peer is peer:
            worker.load = load

    def peer_lost(self, peer: Peer) -> None:
        worker = self._workers.get(peer.peer_id)
        if worker is not None and worker.peer is peer:
            del self._workers[peer.peer_id]

    # RouteChooser:

    def block_hashes(self, request: Request, known: Sequence[BlockHash]) -> list[BlockHash]:
        root = self._model.config.root_hash(request.max_num_tokens, cache_salt=request.cache_salt)
        return hash_blocks(request.token_ids, self._block_size, root=root, known=known)

    def choose(
        self, request: Request, hashes: Sequence[BlockHash], *, avoid: frozenset[WorkerId]
    ) -> Route | None:
        decode = self._least_loaded(WorkerRole.DECODE, avoid)
        if decode is None:
            return None
        prefill = self._least_loaded(WorkerRole.PREFILL, avoid)
        route = Route(decode.record.ref, prefill and prefill.record.ref, 0)
        self._routes[request.key] = route
        for worker in (decode, prefill):
            if worker is not None:
                worker.placed.add(request.key)
        self._on_placed("local" if prefill is None else "remote")
        return route

    def prefilled(self, key: RequestKey) -> None:
        route = self._routes.get(key)
        if route is not None and route.prefill is not None:
            self._forget(route.prefill.worker_id, key)

    def ended(self, key: RequestKey) -> None:
        route = self._routes.pop(key, None)
        if route is not None:
            self._forget(route.decode.worker_id, key)
            if route.prefill is not None:
                self._forget(route.prefill.worker_id, key)

    # ClusterStatus:

    def unready_reason(self) -> str | None:
        if self._least_loaded(WorkerRole.DECODE, frozenset()) is None:
            return "No decode worker is available."
        return None

    def describe(self) -> list[dict[str, Any]]:
        return [
            {
                "record": msgspec.to_builtins(worker.record),
                "state": str(worker.peer.state),
                "load": msgspec.to_builtins(worker.load),
            }
            for worker in self._workers.values()
        ]

    # For the metrics:

    @property
    def loads(self) -> dict[WorkerId, WorkerLoad]:
        return {worker_id: worker.load for worker_id, worker in self._workers.items()}

    def count_states(self) -> Mapping[tuple[str, str], int]:
        """How many workers there are of each (role, state)."""
        return Counter(
            (str(worker.record.role), str(worker.peer.state)) for worker in self._workers.values()
        )

    @property
    def _block_size(self) -> int:
        return next((worker.record.layout.block_size for worker in self._workers.values()), 16)

    def _least_loaded(self, role: WorkerRole, avoid: frozenset[WorkerId]) -> _Worker | None:
        ready = [
            worker
            for worker in self._workers.values()
            if worker.record.role is role and worker.is_ready
        ]
        wanted = [w for w in ready if w.record.ref.worker_id not in avoid] or ready
        return min(wanted, key=lambda worker: len(worker.placed), default=None)

    def _forget(self, worker_id: WorkerId, key: RequestKey) -> None:
        worker = self._workers.get(worker_id)
        if worker is not None:
            worker.placed.discard(key)
