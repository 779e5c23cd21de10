"""One worker as this router sees it, and what placement is told of it."""

from protocol.ids import WorkerId
from protocol.records import WorkerLoad, WorkerRecord
from services.router.placement.candidates import (
    NO_RATES,
    DecodeCandidate,
    LineRates,
    PrefillCandidate,
)
from services.router.placement.ledger import PlacedWork
from services.runtime.peers import Peer, PeerState


class WorkerMirror:
    """A worker's record, its last load report, and the connection that tells whether it lives."""

    __slots__ = ("_layout", "_line_rates", "_token_bytes", "load", "peer", "record")

    def __init__(self, record: WorkerRecord, peer: Peer) -> None:
        self.record = record
        self.peer = peer
        self.load: WorkerLoad | None = None
        self._line_rates = NO_RATES
        # Worked out of the record each time they're asked for there.
        self._layout = record.layout.fingerprint
        self._token_bytes = record.layout.token_bytes

    @property
    def worker_id(self) -> WorkerId:
        return self.record.ref.worker_id

    def report_came(self, load: WorkerLoad) -> None:
        if self.load is None or load.transfer_gb_per_s != self.load.transfer_gb_per_s:
            self._line_rates = LineRates.of(load.transfer_gb_per_s)
        self.load = load

    @property
    def is_ready(self) -> bool:
        """Whether it may get new work: neither suspect nor about to leave."""
        return self.peer.state is PeerState.ALIVE and not (self.load and self.load.draining)

    def prefill_candidate(self, *, num_cached_blocks: int, pending: PlacedWork) -> PrefillCandidate:
        """`pending` is what its last report doesn't contain yet."""
        record, load = self.record, self.load or WorkerLoad()
        return PrefillCandidate(
            worker_id=self.worker_id,
            layout=self._layout,
            num_cached_tokens=num_cached_blocks * record.layout.block_size,
            num_queued_tokens=load.queued_prefill_tokens + pending.num_prefill_tokens,
            max_num_batched_tokens=record.max_num_batched_tokens,
            ms_per_token=load.prefill_ms_per_token,
            line_rates=self._line_rates,
        )

    def decode_candidate(self, *, num_cached_blocks: int, pending: PlacedWork) -> DecodeCandidate:
        """`pending` is what its last report doesn't contain yet."""
        record, load = self.record, self.load
        if load is None:
            # It has just started: nothing is measured and nothing is in use.
            load = WorkerLoad(num_free_blocks=record.num_blocks)
        num_free_blocks = load.num_free_blocks + load.num_cached_blocks - pending.num_blocks
        return DecodeCandidate(
            worker_id=self.worker_id,
            num_blocks=record.num_blocks,
            num_free_blocks=max(0, num_free_blocks),
            layout=self._layout,
            block_size=record.layout.block_size,
            token_bytes=self._token_bytes,
            num_cached_tokens=num_cached_blocks * record.layout.block_size,
            num_queued_tokens=load.queued_prefill_tokens + pending.num_prefill_tokens,
            num_running=load.num_running,
            num_waiting=load.num_waiting + pending.num_sequences,
            max_num_seqs=record.max_num_seqs,
            ms_per_token=load.prefill_ms_per_token,
            ms_per_step=load.decode_ms_per_step,
            ms_per_sequence=load.decode_ms_per_sequence,
        )
