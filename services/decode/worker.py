"""The decode worker between the network and its engine: who asked for what, who gets which token.

A request comes as `RunLocal`, or as `ExpectRequest` and then by transfer (transfers.py). From there
it's the engine thread's, and each of that thread's turns sends one `StepOutputs` to each router
concerned. A request ends with its last token, an abort, or the loss of its router.
"""

import logging

from kvtransfer.agent import TransferAgent
from protocol.errors import LayoutMismatchError, TransferError
from protocol.ids import RequestKey, WorkerId
from protocol.layout import KVLayout, check_layouts_match
from protocol.messages import (
    AbortRequest,
    ConnectKV,
    ControlMessage,
    ExpectRequest,
    KVConnected,
    LoadReport,
    PrefillDone,
    PrefillFailed,
    PrefixCacheReset,
    RenewTickets,
    RequestFailed,
    ReserveBlocks,
    ResetPrefixCache,
    RunLocal,
    StepOutputs,
    TransferStopped,
)
from protocol.request import SequenceOutput
from services.decode.loop import Abort, Command, DropCache, StartLocal, TurnReport
from services.decode.transfers import IncomingTransfers
from services.runtime.engine_thread import EngineThread
from services.runtime.peers import ChannelEvent, Peer, PeerDown, PeerUp, Received
from services.runtime.tasks import TaskOwner

logger = logging.getLogger(__name__)


class DecodeWorker:
    """Everything here runs in the event loop's thread."""

    def __init__(
        self,
        *,
        layout: KVLayout,
        agent: TransferAgent,
        engine_thread: EngineThread[Command],
        transfers: IncomingTransfers,
        tasks: TaskOwner,
    ) -> None:
        self._layout = layout
        self._agent = agent
        self._engine_thread = engine_thread
        self._transfers = transfers
        self._tasks = tasks
        self._routers: dict[RequestKey, Peer] = {}
        self._resets: dict[int, Peer] = {}  # who wants to know of them

    @property
    def num_requests(self) -> int:
        return len(self._routers)

    def on_channel(self, event: ChannelEvent) -> None:
        match event:
            case PeerUp():
                pass
            case PeerDown(peer):
                self._agent.drop_peer(peer.peer_id, peer.incarnation)
                self._transfers.sender_lost(peer)
                self._router_lost(peer)
            case Received(peer, message):
                self._on_message(peer, message)

    def on_turn(self, report: TurnReport) -> None:
        """Takes what the engine thread's turn has made."""
        for room in report.rooms:
            self._transfers.grant(room)
        for refused in report.refused:
            self._transfers.refused(refused.key)
            self._fail(
                refused.key, refused.message, retryable=refused.retryable, field=refused.field
            )
        self._send_outputs(report.outputs)
        for dropped in report.caches_dropped:
            answer = PrefixCacheReset(dropped.reset_id, dropped.num_blocks)
            if asker := self._resets.pop(dropped.reset_id, None):
                asker.send(answer)

    def maintain(self) -> None:
        self._transfers.end_leases()

    def transfer_rates(self) -> dict[WorkerId, float]:
        return {}

    def give_back(self, key: RequestKey, message: str) -> None:
        """The request failed here, but another attempt may succeed."""
        self._fail(key, message, retryable=True)

    def _on_message(self, peer: Peer, message: ControlMessage) -> None:
        match message:
            case RunLocal(request):
                self._routers[request.key] = peer
                self._engine_thread.post(StartLocal(request))
            case ExpectRequest(request, prefill):
                self._routers[request.key] = peer
                self._transfers.expect(request, prefill)
            case AbortRequest(key):
                self._abort(key)
            case ResetPrefixCache(reset_id):
                self._resets[reset_id] = peer
                self._engine_thread.post(DropCache(reset_id))
            case ReserveBlocks():
                self._transfers.reserve(peer, message)
            case RenewTickets(ticket_ids):
                self._transfers.renew(ticket_ids)
            case PrefillDone():
                self._prefill_done(message)
            case PrefillFailed():
                self._transfers.prefill_failed(message)
                self._routers.pop(message.key, None)
            case TransferStopped():
                self._transfers.transfer_stopped(message)
            case LoadReport():
                pass  # prefill workers report to every peer
            case ConnectKV():
                self._tasks.start(self._meet_sender(peer, message))
            case _:
                logger.warning("%s sent %s, which a decode worker doesn't take", peer, message)

    async def _meet_sender(self, peer: Peer, message: ConnectKV) -> None:
        try:
            check_layouts_match(self._layout, message.layout, peer=peer.peer_id)
            await self._agent.connect(message.agent)
        except (LayoutMismatchError, TransferError) as error:
            logger.error("refused KV from %s: %s", peer.peer_id, error)
            peer.send(KVConnected(b"", error=str(error)))
        else:
            peer.send(KVConnected(self._agent.metadata()))

    def _prefill_done(self, message: PrefillDone) -> None:
        if message.first.finish_reason is not None:
            self._routers.pop(message.key, None)
        self._transfers.prefill_done(message)

    def _abort(self, key: RequestKey) -> None:
        if self._routers.pop(key, None) is None:
            return
        if key in self._transfers:
            self._transfers.abort(key)
        else:
            self._engine_thread.post(Abort(key))

    def _router_lost(self, peer: Peer) -> None:
        for key in [key for key, router in self._routers.items() if router is peer]:
            self._abort(key)

    def _fail(
        self, key: RequestKey, message: str, *, retryable: bool, field: str | None = None
    ) -> None:
        router = self._routers.pop(key, None)
        if router is not None:
            router.send(RequestFailed(key, message, retryable, field))

    def _send_outputs(self, outputs: list[SequenceOutput]) -> None:
        by_router: dict[Peer, list[SequenceOutput]] = {}
        for output in outputs:
            router = self._routers.get(output.key)
            if router is None:
                continue  # aborted while the step ran
            by_router.setdefault(router, []).append(output)
            if output.finish_reason is not None:
                del self._routers[output.key]
        for router, its_outputs in by_router.items():
            router.send(StepOutputs(its_outputs))
