"""The listening end of the control plane: a ROUTER socket and the peers that came to it."""

import asyncio
import logging
from collections.abc import Mapping

import zmq

from protocol.errors import StartupError, UnreadableError
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

logger = logging.getLogger(__name__)


class ControlServer:
    """Accepts peers, greets them, and reports what they send and when they are gone.

    A ROUTER socket refuses to send to a route whose connection has closed. That is how a dead
    peer is noticed here: by the probe that follows each disconnect on the socket, at the latest
    by the next heartbeat.
    """

    def __init__(
        self,
        identity: Identity,
        handler: ChannelHandler,
        *,
        context: zmq.Context[zmq.Socket[bytes]],
        timings: ChannelTimings,
    ) -> None:
        self._hello = encode_message(
            Hello(PROTOCOL_VERSION, identity.peer_id, identity.incarnation)
        )
        self._handler = handler
        self._timings = timings
        self._loop = asyncio.get_running_loop()
        self._by_route: dict[bytes, Peer] = {}
        self._by_id: dict[str, Peer] = {}
        self._zmq_socket = context.socket(zmq.ROUTER)
        configure(self._zmq_socket, timings)
        self._zmq_socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self._monitor = SocketMonitor(self._zmq_socket, zmq.EVENT_DISCONNECTED, self._probe)
        self._socket = LoopSocket(self._zmq_socket, self._on_frames)
        self._ticker = Ticker(timings.heartbeat_interval_s, self._on_tick)

    def bind(self, address: str) -> str:
        """Listens on a ZMQ endpoint; returns it with the port that was chosen for port 0.

        Raises StartupError if the address is taken or isn't this machine's.
        """
        if "[" in address:
            self._zmq_socket.setsockopt(zmq.IPV6, 1)
        try:
            self._zmq_socket.bind(address)
        except zmq.ZMQError as error:
            raise StartupError(f"cannot listen on {address}: {error.strerror}") from error
        return self._zmq_socket.getsockopt_string(zmq.LAST_ENDPOINT)

    @property
    def peers(self) -> Mapping[str, Peer]:
        """The peers that have greeted and are not lost, by id."""
        return self._by_id

    def close(self) -> None:
        """Says Goodbye to all peers and stops listening."""
        for peer in list(self._by_route.values()):
            self._lose(peer, LostReason.CLOSED)
        self._ticker.stop()
        self._monitor.close()
        self._socket.close(self._timings.goodbye_linger_s)

    def transmit(self, peer: Peer, message: ControlMessage) -> None:
        self._transmit(peer, encode_message(message))

    def _transmit(self, peer: Peer, payload: bytes) -> None:
        try:
            self._socket.send([peer.route, payload])
        except zmq.Again:
            peer.signal(PeerSignal.GONE)
            # Later: the caller of Peer.send isn't prepared for a PeerDown inside of its call.
            self._loop.call_soon(self._report, peer, LostReason.OVERFLOW, "it takes no messages")
        except zmq.ZMQError as error:
            if error.errno != zmq.EHOSTUNREACH:
                raise
            self._loop.call_soon(self._lose_disconnected, peer)

    def _on_frames(self, frames: list[bytes]) -> None:
        route, payload = frames[0], frames[-1]
        peer = self._by_route.get(route)
        try:
            message = decode_message(payload)
        except UnreadableError as error:
            if peer is None:
                logger.warning("unreadable message from an unknown peer: %s", error)
            else:
                self._lose(peer, LostReason.UNREADABLE, str(error))
            return
        if peer is None:
            self._greet(route, message)
        elif not peer.is_lost:
            self._deliver(peer, message)

    def _deliver(self, peer: Peer, message: ControlMessage) -> None:
        peer.heard()
        match message:
            case Heartbeat() | Hello():
                pass
            case Goodbye():
                self._lose(peer, LostReason.GOODBYE)
            case _:
                self._handler(Received(peer, message))

    def _greet(self, route: bytes, message: ControlMessage) -> None:
        if not isinstance(message, Hello):
            # It was given up here and doesn't know yet. (Never answer Goodbye with Goodbye.)
            if not isinstance(message, Goodbye):
                self._socket.send_if_possible([route, GOODBYE_PAYLOAD])
            return
        self._socket.send_if_possible([route, self._hello])
        if message.protocol_version != PROTOCOL_VERSION:
            logger.error(
                "refused %s: it speaks protocol version %d, this process %d",
                message.peer_id,
                message.protocol_version,
                PROTOCOL_VERSION,
            )
            return
        previous = self._by_id.get(message.peer_id)
        if previous is not None:
            self._lose(previous, LostReason.SUPERSEDED, "it connected anew")
        peer = Peer(message.peer_id, message.incarnation, link=self, route=route)
        peer.signal(PeerSignal.GREETED)
        self._by_route[route] = peer
        self._by_id[peer.peer_id] = peer
        self._handler(PeerUp(peer))

    def _lose_disconnected(self, peer: Peer) -> None:
        # What the peer sent before its end is still owed to the handler.
        self._socket.drain(self._timings.send_queue_messages)
        self._lose(peer, LostReason.DISCONNECTED)

    def _lose(self, peer: Peer, reason: LostReason, detail: str = "") -> None:
        if not peer.is_lost:
            peer.signal(PeerSignal.GONE)
        self._report(peer, reason, detail)

    def _report(self, peer: Peer, reason: LostReason, detail: str) -> None:
        if self._by_route.pop(peer.route, None) is None:
            return
        del self._by_id[peer.peer_id]
        if reason not in (LostReason.GOODBYE, LostReason.DISCONNECTED):
            self._socket.send_if_possible([peer.route, GOODBYE_PAYLOAD])
        self._handler(PeerDown(peer, reason, detail))

    def _probe(self, _event: int) -> None:
        for peer in self._by_route.values():
            if not peer.is_lost:
                self._transmit(peer, HEARTBEAT_PAYLOAD)

    def _on_tick(self, elapsed_s: float) -> None:
        self._socket.drain()
        for peer in list(self._by_route.values()):
            if peer.is_lost:
                continue
            if peer.add_silence(elapsed_s, self._timings):
                self._lose(peer, LostReason.SILENT, f"nothing for {peer.silence_s:.1f} s")
            else:
                self._transmit(peer, HEARTBEAT_PAYLOAD)
