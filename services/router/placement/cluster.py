"""The workers as this router sees them: who can take work, and who gets the next request.

Redis says which workers there are (records_came), the control connections which of them live,
their reports how loaded they are, their KV events (index.py) what they have cached. With Redis
away the last known state goes on being used.
"""

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from engine.models.encoder_config import EncoderConfig
from protocol.block_hash import BlockHash, hash_blocks
from protocol.ids import RequestKey, WorkerId, WorkerRole
from protocol.records import WorkerLoad
from protocol.request import Request
from services.router.dispatch.flight import Route
from services.router.placement.candidates import PlacementPolicy, RequestFacts
from services.router.placement.index import PrefixIndex
from services.router.placement.ledger import PlacementLedger
from services.router.placement.mirror import WorkerMirror
from services.router.placement.placement import Option, Placement, place
from services.router.served_model import ServedModel
from services.runtime.channel import ControlChannel
from services.runtime.directory import Records
from services.runtime.kv_feed import KVFeed
from services.runtime.peers import Peer

logger = logging.getLogger(__name__)

DEFAULT_BLOCK_SIZE = 16
# What a request is taken to generate, unless it asks for less.
EXPECTED_OUTPUT_TOKENS = 256
# So many sequences for each batch slot may be under way: enough that a slot which
# becomes free is filled at once, few enough that later requests are placed by later facts.
ADMITTED_PER_SLOT = 2


@dataclass(frozen=True, slots=True)
class PlacementState:
    """What placement decides by; shared with those that keep it up to date."""

    index: PrefixIndex
    ledger: PlacementLedger
    policy: PlacementPolicy


class Cluster:
    """Follows the directory, keeps a connection to every worker, chooses routes."""

    def __init__(
        self,
        channel: ControlChannel,
        model: ServedModel,
        state: PlacementState,
        feed: KVFeed,
        *,
        on_placed: Callable[[str], None],
    ) -> None:
        """`feed` brings the KV events of followed workers into `state.index`."""
        self._channel = channel
        self._model = model
        self._index = state.index
        self._ledger = state.ledger
        self._policy = state.policy
        self._feed = feed
        self._on_placed = on_placed
        self._workers: dict[WorkerId, WorkerMirror] = {}
        self._num_chosen = 0
        # Of workers that can do all of a request, and have the last word on each.
        self._last_role = WorkerRole.ENCODE if model.only_embeds else WorkerRole.DECODE

    def records_came(self, records: Records) -> None:
        """What Redis says now. A worker that is missing there but connected here is kept."""
        for worker_id, record in records.items():
            known = self._workers.get(worker_id)
            if known is not None and not known.peer.is_lost:
                if known.record.ref == record.ref:
                    continue
                self._forget(worker_id)
                self._channel.disconnect(known.record.ref)
            self._workers[worker_id] = WorkerMirror(record, self._channel.connect(record.ref))
            self._feed.follow(record.ref)
            self._model.adopt_worker(
                fingerprint=record.layout.model_fingerprint, max_model_len=record.max_model_len
            )

    def load_came(self, peer: Peer, load: WorkerLoad) -> None:
        worker = self._workers.get(peer.peer_id)
        if worker is not None and worker.peer is peer:
            worker.report_came(load)
            self._ledger.reported(peer.peer_id)

    def peer_lost(self, peer: Peer) -> None:
        worker = self._workers.get(peer.peer_id)
        if worker is not None and worker.peer is peer:
            self._forget(peer.peer_id)

    def capacity(self) -> int | None:
        """How many sequences should be under way at most; None while there is no worker."""
        num_slots = sum(worker.record.max_num_seqs for worker in self._ready(self._last_role))
        return ADMITTED_PER_SLOT * num_slots or None

    # RouteChooser:

    def block_hashes(self, request: Request, known: Sequence[BlockHash]) -> list[BlockHash]:
        config = self._model.config
        if isinstance(config, EncoderConfig):
            return []  # nothing is cached of texts
        root = config.root_hash(
            request.max_num_tokens, cache_salt=request.cache_salt, kv_dtype=self._kv_dtype
        )
        return hash_blocks(request.token_ids, self._block_size, root=root, known=known)

    def choose(
        self, request: Request, hashes: Sequence[BlockHash], *, avoid: frozenset[WorkerId]
    ) -> Route | None:
        placement = self._place(request, hashes, avoid)
        if placement is None:
            return None
        chosen = placement.chosen
        num_tokens = len(request.token_ids)
        self._ledger.placed(
            request.key,
            prefill=chosen.prefill,
            decode=chosen.decode,
            num_prefill_tokens=max(1, num_tokens - chosen.num_cached_tokens),
            num_blocks=num_tokens // self._block_size + 1,
        )
        self._on_placed("local" if chosen.prefill is None else "remote")
        if logger.isEnabledFor(logging.DEBUG):
            _log_placement(request.key, placement)
        decode = self._workers[chosen.decode].record.ref
        prefill = None if chosen.prefill is None else self._workers[chosen.prefill].record.ref
        return Route(decode, prefill, min(chosen.num_cached_tokens, num_tokens))

    def prefilled(self, key: RequestKey) -> None:
        self._ledger.prefilled(key)

    def ended(self, key: RequestKey) -> None:
        self._ledger.ended(key)

    # ClusterStatus:

    def unready_reason(self) -> str | None:
        if not self._ready(self._last_role):
            return f"No {self._last_role} worker is available."
        return None

    def describe(self) -> list[dict[str, Any]]:
        return [
            {
                "record": msgspec.to_builtins(worker.record),
                "state": str(worker.peer.state),
                "index": str(self._index.state(worker_id)),
                "load": msgspec.to_builtins(worker.load or WorkerLoad()),
            }
            for worker_id, worker in self._workers.items()
        ]

    # For the operator:

    @property
    def peers(self) -> list[Peer]:
        """The workers' connections."""
        return [worker.peer for worker in self._workers.values()]

    def adopt_policy(self, policy: PlacementPolicy) -> None:
        """Of all placements from now on."""
        self._policy = policy

    # For the metrics:

    @property
    def loads(self) -> dict[WorkerId, WorkerLoad]:
        """The last report of each worker that has sent one."""
        return {
            worker_id: worker.load
            for worker_id, worker in self._workers.items()
            if worker.load is not None
        }

    def count_states(self) -> Mapping[tuple[str, str], int]:
        """How many workers there are of each (role, state)."""
        return Counter(
            (str(worker.record.role), str(worker.peer.state)) for worker in self._workers.values()
        )

    def count_index_states(self) -> Mapping[str, int]:
        """Of how many workers the cached blocks are known exactly, and of how many not."""
        counts = Counter({"exact": 0, "degraded": 0})
        counts.update(str(self._index.state(worker_id)) for worker_id in self._workers)
        return counts

    def _place(
        self, request: Request, hashes: Sequence[BlockHash], avoid: frozenset[WorkerId]
    ) -> Placement | None:
        matched = {} if request.reads_whole_prompt else self._index.match(hashes)
        num_done = len(request.token_ids) - request.num_prompt_tokens
        num_left = (request.sampling.max_tokens or EXPECTED_OUTPUT_TOKENS) - num_done
        self._num_chosen += 1
        facts = RequestFacts(
            num_tokens=len(request.token_ids),
            num_output_tokens=max(1, min(EXPECTED_OUTPUT_TOKENS, num_left)),
            tie_breaker=self._num_chosen,
            is_transferred=not request.ends_with_prefill,
        )
        prefill = [
            worker.prefill_candidate(
                num_cached_blocks=matched.get(worker.worker_id, 0),
                pending=self._ledger.pending(worker.worker_id),
            )
            for worker in _preferred(self._ready(WorkerRole.PREFILL), avoid)
        ]
        decode = [
            worker.decode_candidate(
                num_cached_blocks=matched.get(worker.worker_id, 0),
                pending=self._ledger.pending(worker.worker_id),
            )
            for worker in _preferred(self._ready(self._last_role), avoid)
        ]
        return place(facts, prefill, decode, self._policy)

    @property
    def _block_size(self) -> int:
        for worker in self._workers.values():
            return worker.record.layout.block_size
        return DEFAULT_BLOCK_SIZE

    @property
    def _kv_dtype(self) -> str:
        for worker in self._workers.values():
            return worker.record.layout.dtype
        return ""

    def _ready(self, role: WorkerRole) -> list[WorkerMirror]:
        return [
            worker
            for worker in self._workers.values()
            if worker.record.role is role and worker.is_ready
        ]

    def _forget(self, worker_id: WorkerId) -> None:
        del self._workers[worker_id]
        self._feed.unfollow(worker_id)
        self._index.remove_worker(worker_id)
        self._ledger.worker_lost(worker_id)


def _preferred(ready: list[WorkerMirror], avoid: frozenset[WorkerId]) -> list[WorkerMirror]:
    """Without those to avoid, unless there are no others."""
    return [worker for worker in ready if worker.worker_id not in avoid] or ready


def _log_placement(key: RequestKey, placement: Placement) -> None:
    def text(option: Option | None) -> str:
        if option is None:
            return "none"
        cost = option.cost
        return (
            f"{option.prefill or 'local'} -> {option.decode} {cost.total_ms:.1f} ms (queue "
            f"{cost.prefill_queue_ms:.1f}, prefill {cost.prefill_ms:.1f}, transfer "
            f"{cost.exposed_transfer_ms:.1f}, wait {cost.decode_wait_ms:.1f}, slowdown "
            f"{cost.slowdown_ms:.1f})"
        )

    logger.debug(
        "placed %s: %s; best local %s; best remote %s",
        key.request_id,
        text(placement.chosen),
        text(placement.best_local),
        text(placement.best_remote),
    )
