"""The encode worker between the network and its engine.

A request comes as `RunLocal`, waits for a step, and ends with the step's one answer, its vector; or
before, with an abort or the loss of its router. Nothing is kept of it and nothing is transferred.
"""

import logging

from protocol.ids import RequestKey, WorkerId
from protocol.messages import (
    AbortRequest,
    ControlMessage,
    PrefixCacheReset,
    RequestFailed,
    ResetPrefixCache,
    RunLocal,
    StepOutputs,
)
from protocol.request import SequenceOutput
from services.encode.loop import Abort, Command, StartText, TurnReport
from services.runtime.engine_thread import EngineThread
from services.runtime.peers import ChannelEvent, Peer, PeerDown, PeerUp, Received

logger = logging.getLogger(__name__)


class EncodeWorker:
    """Everything here runs in the event loop's thread."""

    def __init__(self, engine_thread: EngineThread[Command]) -> None:
        self._engine_thread = engine_thread
        self._routers: dict[RequestKey, Peer] = {}

    @property
    def num_requests(self) -> int:
        return len(self._routers)

    def on_channel(self, event: ChannelEvent) -> None:
        match event:
            case PeerUp():
                pass
            case PeerDown(peer):
                for key in [key for key, router in self._routers.items() if router is peer]:
                    self._abort(key)
            case Received(peer, message):
                self._on_message(peer, message)

    def on_turn(self, report: TurnReport) -> None:
        """Takes what the engine thread's turn has made; one message to each router."""
        outputs: dict[Peer, list[SequenceOutput]] = {}
        for output in report.outputs:
            router = self._routers.pop(output.key, None)
            if router is not None:
                outputs.setdefault(router, []).append(output)
        for router, its_outputs in outputs.items():
            router.send(StepOutputs(its_outputs))
        for refused in report.refused:
            router = self._routers.pop(refused.key, None)
            if router is not None:
                router.send(RequestFailed(refused.key, refused.message, retryable=False))

    def maintain(self) -> None:
        pass  # there are no leases

    def transfer_rates(self) -> dict[WorkerId, float]:
        return {}

    def _on_message(self, peer: Peer, message: ControlMessage) -> None:
        match message:
            case RunLocal(request):
                self._routers[request.key] = peer
                self._engine_thread.post(StartText(request))
            case AbortRequest(key):
                self._abort(key)
            case ResetPrefixCache(reset_id):
                peer.send(PrefixCacheReset(reset_id, num_dropped_blocks=0))
            case _:
                logger.warning("%s sent %s, which an encode worker doesn't take", peer, message)

    def _abort(self, key: RequestKey) -> None:
        if self._routers.pop(key, None) is not None:
            self._engine_thread.post(Abort(key))
