"""The prefill worker between the network and its engine.

A request comes as `RunPrefill`; the engine thread computes it in chunks, its `Push` sends the
blocks behind (pushes.py), and its first token goes to the router as soon as it's sampled. It ends
when decode has everything, or is stopped by an abort, by decode (`CancelTransfer`), or by the
loss of its router or decode worker. A stopped request's blocks are freed only after its writes
have ended, and decode is told so that its quarantine can end.
"""

import asyncio
import logging
from dataclasses import dataclass

from protocol.errors import LayoutMismatchError, TransferError, WorkerLostError
from protocol.ids import RequestKey, TicketId, WorkerId
from protocol.messages import (
    AbortRequest,
    CancelTransfer,
    ControlMessage,
    GrantTicket,
    KVConnected,
    LoadReport,
    PrefillFailed,
    PrefixCacheReset,
    RenewTickets,
    RequestFailed,
    ResetPrefixCache,
    RunPrefill,
    StepOutputs,
    TransferStopped,
)
from protocol.request import SequenceOutput
from services.prefill.links import DecodeLink, DecodeLinks
from services.prefill.loop import Abort, Command, DropCache, Release, StartPrefill, TurnReport
from services.prefill.pushes import Push
from services.runtime.engine_thread import EngineThread
from services.runtime.metrics import WorkerMetrics
from services.runtime.peers import ChannelEvent, Peer, PeerDown, PeerUp, Received
from services.runtime.tasks import TaskOwner

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class _Outgoing:
    """One request here: its router, its push, the task that drives the push, why it failed."""

    router: Peer
    push: Push
    task: asyncio.Task[None]
    failure: str | None = None


class PrefillWorker:
    """Everything here runs in the event loop's thread."""

    def __init__(
        self,
        *,
        block_size: int,
        engine_thread: EngineThread[Command],
        links: DecodeLinks,
        tasks: TaskOwner,
        metrics: WorkerMetrics,
    ) -> None:
        self._block_size = block_size
        self._engine_thread = engine_thread
        self._links = links
        self._tasks = tasks
        self._metrics = metrics
        self._outgoing: dict[RequestKey, _Outgoing] = {}
        self._resets: dict[int, Peer] = {}  # who wants to know of them

    @property
    def num_requests(self) -> int:
        return len(self._outgoing)

    def on_channel(self, event: ChannelEvent) -> None:
        match event:
            case PeerUp():
                pass
            case PeerDown(peer, reason):
                self._links.lost(peer, reason)
                self._peer_lost(peer)
            case Received(peer, message):
                self._on_message(peer, message)

    def on_turn(self, report: TurnReport) -> None:
        """Takes what the engine thread's turn has made."""
        for chunk in report.chunks:
            outgoing = self._outgoing.get(chunk.key)
            if outgoing is not None:
                outgoing.push.chunk_computed(chunk.num_computed_tokens, chunk.block_ids)
        first_tokens: dict[Peer, list[SequenceOutput]] = {}
        for done in report.done:
            outgoing = self._outgoing.get(done.first.key)
            if outgoing is not None:
                first_tokens.setdefault(outgoing.router, []).append(done.first)
                outgoing.push.prompt_done(done.first, done.timings)
        for router, outputs in first_tokens.items():
            router.send(StepOutputs(outputs))
        for refused in report.refused:
            self._fail(
                refused.key, refused.message, retryable=refused.retryable, field=refused.field
            )
        for dropped in report.caches_dropped:
            answer = PrefixCacheReset(dropped.reset_id, dropped.num_blocks)
            if asker := self._resets.pop(dropped.reset_id, None):
                asker.send(answer)

    def transfer_rates(self) -> dict[WorkerId, float]:
        return self._links.rates_gb_per_s()

    def maintain(self) -> None:
        """Keeps the leases of slow transfers alive."""
        by_link: dict[DecodeLink, list[TicketId]] = {}
        for outgoing in self._outgoing.values():
            ticket = outgoing.push.ticket
            link = outgoing.push.link
            if ticket is not None and link is not None:
                by_link.setdefault(link, []).append(ticket.ticket_id)
        for link, ticket_ids in by_link.items():
            link.peer.send(RenewTickets(ticket_ids))

    def _on_message(self, peer: Peer, message: ControlMessage) -> None:
        match message:
            case RunPrefill():
                self._start(peer, message)
            case AbortRequest(key):
                self._stop(key)
            case ResetPrefixCache(reset_id):
                self._resets[reset_id] = peer
                self._engine_thread.post(DropCache(reset_id))
            case GrantTicket(ticket):
                outgoing = self._outgoing.get(ticket.key)
                if outgoing is None:
                    # Stopped before the ticket came: nothing was written, nothing will be.
                    peer.send(TransferStopped(ticket.key, ticket.ticket_id))
                else:
                    outgoing.push.granted(ticket)
            case CancelTransfer(key, ticket_id):
                self._cancelled_by_decode(peer, key, ticket_id)
            case LoadReport():
                pass  # decode workers report to every peer
            case KVConnected():
                self._links.answered(peer, message)
            case _:
                logger.warning("%s sent %s, which a prefill worker doesn't take", peer, message)

    def _start(self, router: Peer, message: RunPrefill) -> None:
        request = message.request
        if request.key in self._outgoing:
            logger.warning("request %s came twice; the second is ignored", request.key)
            return
        link = None if message.decode is None else self._links.to(message.decode)
        push = Push(
            request.key,
            len(request.token_ids),
            link,
            block_size=self._block_size,
            metrics=self._metrics,
        )
        task = self._tasks.start(self._send(push))
        self._outgoing[request.key] = _Outgoing(router, push, task)
        self._engine_thread.post(StartPrefill(request))

    async def _send(self, push: Push) -> None:
        try:
            await push.run()
        except (TransferError, LayoutMismatchError, WorkerLostError) as error:
            self._fail(push.key, str(error), retryable=True)
        else:
            outgoing = self._outgoing.get(push.key)
            # Stopped while this task was on its way to say that it's through: `_end` says the rest.
            if outgoing is not None and outgoing.push is push:
                del self._outgoing[push.key]
                self._engine_thread.post(Release(push.key))

    def _cancelled_by_decode(
        self, decode: Peer, key: RequestKey, ticket_id: TicketId | None
    ) -> None:
        if key in self._outgoing:
            self._stop(key)
        elif ticket_id is not None:
            decode.send(TransferStopped(key, ticket_id))

    def _peer_lost(self, peer: Peer) -> None:
        for key, outgoing in list(self._outgoing.items()):
            link = outgoing.push.link
            if link is not None and link.peer is peer:
                self._fail(key, f"decode worker {peer.peer_id} was lost", retryable=True)
            elif outgoing.router is peer:
                self._stop(key)

    def _fail(
        self, key: RequestKey, message: str, *, retryable: bool, field: str | None = None
    ) -> None:
        outgoing = self._outgoing.get(key)
        if outgoing is not None:
            outgoing.failure = message
            outgoing.router.send(RequestFailed(key, message, retryable, field))
            self._stop(key)

    def _stop(self, key: RequestKey) -> None:
        outgoing = self._outgoing.pop(key, None)
        if outgoing is not None:
            self._tasks.start(self._end(outgoing))

    async def _end(self, outgoing: _Outgoing) -> None:
        push = outgoing.push
        outgoing.task.cancel()
        await asyncio.wait([outgoing.task])
        await push.stop()
        # Only now: until here a write may have been reading our blocks and writing decode's.
        self._engine_thread.post(Abort(push.key))
        if push.link is None:
            return
        if outgoing.failure is not None:
            push.link.peer.send(PrefillFailed(push.key, outgoing.failure))
        elif push.ticket is not None:
            push.link.peer.send(TransferStopped(push.key, push.ticket.ticket_id))
