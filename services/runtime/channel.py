"""A process's place in the control plane: one listening socket, one connection a worker.

The life of a connection:

 1. The connecting process knows a `WorkerRef` (from Redis or from a message) and opens a DEALER
    socket to it; `Peer` is CONNECTING, messages to it wait.
 2. Both sides say `Hello`. Another protocol version or another incarnation than the ref's ends
    it here; else the peer is ALIVE and `PeerUp` is reported on both sides.
 3. Messages go both ways, in order, each reported as `Received`.
 4. Silence makes the peer SUSPECT (no new work), a word from it ALIVE again.
 5. A closed connection, `Goodbye`, a full queue or a long silence makes it LOST: one `PeerDown`,
    nothing after it. Whoever still wants the worker connects again and starts at 1.
"""

import asyncio

import zmq

from protocol.errors import WorkerLostError
from protocol.ids import Incarnation, WorkerId, WorkerRef
from services.runtime.control_client import ControlClient
from services.runtime.control_server import ControlServer
from services.runtime.peers import (
    ChannelEvent,
    ChannelHandler,
    ChannelTimings,
    Identity,
    Peer,
    PeerDown,
)


class ControlChannel:
    """All control connections of one process.

    `handler` is called in the event loop with every `PeerUp`, `Received` and `PeerDown`, of
    peers that came here and of those connected to alike; it must not block. Construct it inside
    the running loop, and use it and its peers in the loop's thread only.
    """

    def __init__(
        self,
        identity: Identity,
        handler: ChannelHandler,
        *,
        timings: ChannelTimings | None = None,
    ) -> None:
        self.identity = identity
        self._handler = handler
        self._timings = timings or ChannelTimings()
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._server: ControlServer | None = None
        self._clients: dict[tuple[WorkerId, Incarnation], ControlClient] = {}
        self._closed = False

    def listen(self, address: str) -> str:
        """Opens the server socket at e.g. `tcp://127.0.0.1:0`; returns the endpoint with its port.

        Raises StartupError if the address can't be had.
        """
        assert self._server is None, "one server a process"
        server = ControlServer(
            self.identity, self._dispatch, context=self._context, timings=self._timings
        )
        self._server = server
        return server.bind(address)

    def connect(self, ref: WorkerRef) -> Peer:
        """The connection to this incarnation of the worker, opened if there is none.

        Returns at once, maybe with a CONNECTING peer; what is sent to it leaves after the
        handshake. Failure is reported as PeerDown. After `close` every peer is LOST.
        """
        if self._closed:
            # A socket opened now would keep ZMQ's context, and so `close`, from ending.
            return Peer.lost(ref.worker_id, ref.incarnation)
        return self._client(ref).peer

    async def connected(self, ref: WorkerRef) -> Peer:
        """As `connect`, and waits for the handshake.

        Raises ProtocolMismatchError or WorkerLostError.
        """
        if self._closed:
            raise WorkerLostError(f"{ref.worker_id}: this process is closing its connections")
        return await self._client(ref).ready()

    def disconnect(self, ref: WorkerRef) -> None:
        """Ends the connection to this incarnation, if there is one, with a Goodbye."""
        client = self._clients.get((ref.worker_id, ref.incarnation))
        if client is not None:
            client.close()

    def peer(self, peer_id: str) -> Peer | None:
        """The live connection by which `peer_id` came to this process, None if there is none."""
        peer = None if self._server is None else self._server.peers.get(peer_id)
        return None if peer is None or peer.is_lost else peer

    @property
    def peers(self) -> list[Peer]:
        """All peers that aren't LOST, both those that came here and those connected to."""
        accepted = [] if self._server is None else list(self._server.peers.values())
        opened = [client.peer for client in self._clients.values()]
        return [peer for peer in accepted + opened if not peer.is_lost]

    async def close(self) -> None:
        """Says Goodbye to everybody; returns when it has left or after `goodbye_linger_s`.

        The handler isn't called any more, not even with the PeerDowns of this very closing.
        """
        self._closed = True
        for client in list(self._clients.values()):
            client.close()
        if self._server is not None:
            self._server.close()
        await asyncio.get_running_loop().run_in_executor(None, self._context.term)

    def _client(self, ref: WorkerRef) -> ControlClient:
        key = (ref.worker_id, ref.incarnation)
        client = self._clients.get(key)
        if client is None:
            client = ControlClient(
                self.identity, ref, self._on_client, context=self._context, timings=self._timings
            )
            self._clients[key] = client
        return client

    def _on_client(self, event: ChannelEvent) -> None:
        if isinstance(event, PeerDown):
            del self._clients[event.peer.peer_id, event.peer.incarnation]
        self._dispatch(event)

    def _dispatch(self, event: ChannelEvent) -> None:
        if not self._closed:
            self._handler(event)
