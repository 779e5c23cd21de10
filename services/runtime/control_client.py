"""The connecting end of the control plane: a DEALER socket to one incarnation of one worker."""

import asyncio
from collections import deque

import zmq

from protocol.errors import ProtocolMismatchError, UnreadableError, WorkerLostError
from protocol.ids import WorkerRef
from protocol.messages import PROTOCOL_VERSION, ControlMessage, Goodbye, Heartbeat, Hello
from services.runtime.loop_socket import LoopSocket
from services.runtime.monitor import SocketMonitor
from services.runtime.peers import (
    ChannelHandler,
    ChannelTimings,
    Identity,
    LostReason,
    Peer,
    PeerDown,
    PeerSignal,
    PeerState,
    PeerUp,
    Received,
)
from services.runtime.ticker import Ticker
from services.runtime.wire import (
    GOODBYE_PAYLOAD,
    HEARTBEAT_PAYLOAD,
    configure,
    decode_message,
    encode_message,
)

# After these nobody is there to read what is still queued.
_UNHEARD = frozenset(
    (
        LostReason.GOODBYE,
        LostReason.DISCONNECTED,
        LostReason.UNREACHABLE,
        LostReason.OTHER_INCARNATION,
        LostReason.OVERFLOW,
    )
)


class ControlClient:
    """One connection, one life: when its peer is LOST, the client is closed for good.

    ZMQ's own reconnection works until the first handshake only. Afterwards it could deliver
    messages meant for a dead incarnation to its successor at the same address.
    """

    def __init__(
        self,
        identity: Identity,
        ref: WorkerRef,
        handler: ChannelHandler,
        *,
        context: zmq.Context[zmq.Socket[bytes]],
        timings: ChannelTimings,
    ) -> None:
        self.ref = ref
        self.peer = Peer(ref.worker_id, ref.incarnation, link=self)
        self._hello = encode_message(
            Hello(PROTOCOL_VERSION, identity.peer_id, identity.incarnation)
        )
        self._handler = handler
        self._timings = timings
        self._loop = asyncio.get_running_loop()
        self._ready: asyncio.Future[None] = self._loop.create_future()
        self._pending: deque[bytes] = deque()
        self._down_reported = False
        socket = context.socket(zmq.DEALER)
        configure(socket, timings)
        if "[" in ref.control_address:
            socket.setsockopt(zmq.IPV6, 1)
        self._monitor = SocketMonitor(
            socket, zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED, self._on_connection
        )
        self._socket = LoopSocket(socket, self._on_frames)
        self._ticker = Ticker(timings.heartbeat_interval_s, self._on_tick)
        socket.connect(ref.control_address)

    async def ready(self) -> Peer:
        """Waits for the handshake, at most `connect_timeout_s`.

        Raises ProtocolMismatchError or WorkerLostError.
        """
        await asyncio.shield(self._ready)
        return self.peer

    def close(self) -> None:
        """Says Goodbye and ends the connection; what was sent before still leaves."""
        self._lose(LostReason.CLOSED)

    def transmit(self, peer: Peer, message: ControlMessage) -> None:
        payload = encode_message(message)
        if peer.state is not PeerState.CONNECTING:
            self._transmit(payload)
        elif len(self._pending) < self._timings.send_queue_messages:
            self._pending.append(payload)
        else:
            self._overflow()

    def _transmit(self, payload: bytes) -> None:
        try:
            self._socket.send([payload])
        except zmq.Again:
            self._overflow()

    def _overflow(self) -> None:
        self.peer.signal(PeerSignal.GONE)
        # Later: the caller of Peer.send isn't prepared for a PeerDown inside of its call.
        self._loop.call_soon(self._report, LostReason.OVERFLOW, "it takes no messages")

    def _on_connection(self, event: int) -> None:
        if self.peer.is_lost:
            return
        if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
            self._transmit(self._hello)
        elif self.peer.state is not PeerState.CONNECTING:
            # What the worker sent before its end is still owed to the handler.
            self._socket.drain(self._timings.send_queue_messages)
            self._lose(LostReason.DISCONNECTED)

    def _on_frames(self, frames: list[bytes]) -> None:
        if self.peer.is_lost:
            return
        try:
            message = decode_message(frames[-1])
        except UnreadableError as error:
            self._lose(LostReason.UNREADABLE, str(error))
            return
        if self.peer.state is PeerState.CONNECTING:
            self._greeted(message)
            return
        self.peer.heard()
        match message:
            case Heartbeat() | Hello():
                pass
            case Goodbye():
                self._lose(LostReason.GOODBYE)
            case _:
                self._handler(Received(self.peer, message))

    def _greeted(self, message: ControlMessage) -> None:
        if not isinstance(message, Hello):
            # A leftover of a connection that broke before its handshake.
            return
        if message.protocol_version != PROTOCOL_VERSION:
            self._lose(
                LostReason.OTHER_PROTOCOL,
                f"it speaks version {message.protocol_version}, this process {PROTOCOL_VERSION}",
            )
        elif (message.peer_id, message.incarnation) != (self.ref.worker_id, self.ref.incarnation):
            self._lose(
                LostReason.OTHER_INCARNATION,
                f"{message.peer_id} ({message.incarnation}) is at {self.ref.control_address} now",
            )
        else:
            self.peer.signal(PeerSignal.GREETED)
            self.peer.heard()
            while self._pending and self.peer.state is PeerState.ALIVE:
                self._transmit(self._pending.popleft())
            self._ready.set_result(None)
            self._handler(PeerUp(self.peer))

    def _lose(self, reason: LostReason, detail: str = "") -> None:
        if not self.peer.is_lost:
            self.peer.signal(PeerSignal.GONE)
        self._report(reason, detail)

    def _report(self, reason: LostReason, detail: str) -> None:
        if self._down_reported:
            return
        self._down_reported = True
        self._pending.clear()
        linger_s = 0.0
        if reason not in _UNHEARD:
            self._socket.send_if_possible([GOODBYE_PAYLOAD])
            linger_s = self._timings.goodbye_linger_s
        self._ticker.stop()
        self._monitor.close()
        self._socket.close(linger_s)
        self._fail_ready(reason, detail)
        self._handler(PeerDown(self.peer, reason, detail))

    def _fail_ready(self, reason: LostReason, detail: str) -> None:
        if self._ready.done():
            return
        text = f"{self.ref.worker_id} at {self.ref.control_address}: {reason}, {detail}"
        error = ProtocolMismatchError if reason is LostReason.OTHER_PROTOCOL else WorkerLostError
        self._ready.set_exception(error(text))
        # Whoever didn't wait has the PeerDown; asyncio need not complain.
        self._ready.exception()

    def _on_tick(self, elapsed_s: float) -> None:
        self._socket.drain()
        if self.peer.is_lost:
            return
        connecting = self.peer.state is PeerState.CONNECTING
        if self.peer.add_silence(elapsed_s, self._timings):
            reason = LostReason.UNREACHABLE if connecting else LostReason.SILENT
            self._lose(reason, f"nothing for {self.peer.silence_s:.1f} s")
        elif not connecting:
            self._transmit(HEARTBEAT_PAYLOAD)
