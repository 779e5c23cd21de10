"""The transfer agent: registers one region, connects to peers, pushes blocks, accepts blocks.

A transfer, from both ends:

1. Each agent's `metadata()` reaches the other over the control plane; both `connect`. The receiver
   connects before the sender learns its metadata, so no write comes from a stranger.
2. Receiver: `expect(ticket, …, block_ids)` opens a fence around reserved blocks.
3. Sender: `connection.write(…)` announces blocks, then sends them in few large messages.
4. The receiver checks every announcement against the fence and only then gives the messages a
   place; when all bytes are there it calls `on_write`, and the sender's `write` returns.
5. Receiver: `close_ticket` when the request is complete or cancelled; `drop_peer` when the sender
   is lost.

Who writes when: a block is written only while a receive that this agent posted into it is open;
on one host by this process itself, over a network perhaps by the network card. In device memory,
where a peer process does the writing, receives are posted into staging memory and this process
copies into blocks (kvtransfer/device.py); on devices of one host it reads the peer's blocks instead
(step 3 is then an announcement only), and such a read counts as a receive that is open.
`close_ticket` waits for these receives, so when it has returned while the sender was connected, no
write can land in the ticket's blocks. After `drop_peer` that holds for all tickets but those it
returned.
The sender's blocks are read until `write` or `cancel` returns; a receiver may go on reading after
the sender dropped it, and then gets bytes that may have changed. That does no harm as long as the
receiver counts writes only when the sender says over the control plane how many it completed.
"""

from collections.abc import Callable, Mapping, Sequence

from kvtransfer.config import TransferConfig
from kvtransfer.connection import Connection
from kvtransfer.counters import PeerCounters
from kvtransfer.host import host_identity
from kvtransfer.incoming_write import WriteReceived
from kvtransfer.receiver import WriteReceiver
from kvtransfer.region import Region
from kvtransfer.tags import new_namespace, unpack_tag
from kvtransfer.transport import Arrival, Transport
from kvtransfer.wire import AGENT_PROTOCOL_VERSION, AgentMetadata, decode_metadata, encode
from protocol.errors import TransferError
from protocol.ids import Incarnation, TicketId, WorkerId


class TransferAgent:
    """One worker process's end of all KV transfers; lives in its event loop's thread."""

    def __init__(
        self,
        transport: Transport,
        region: Region,
        *,
        worker_id: WorkerId,
        incarnation: Incarnation,
        on_write: Callable[[WriteReceived], None],
        config: TransferConfig | None = None,
    ) -> None:
        self._transport = transport
        self._region = region
        self._config = config or TransferConfig()
        self._ours = AgentMetadata(
            protocol_version=AGENT_PROTOCOL_VERSION,
            transport=transport.name,
            worker_id=worker_id,
            incarnation=incarnation,
            block_bytes=region.block_bytes,
            tag_namespace=new_namespace(),
            address=transport.address,
            host=host_identity(),
        )
        self._receiver = WriteReceiver(
            region, incarnation=incarnation, config=self._config, on_write=on_write
        )
        self._connections: dict[int, Connection] = {}

    def start(self) -> None:
        """Begins to take messages; call it within the running event loop."""
        self._transport.start(self._on_arrival)

    def metadata(self) -> bytes:
        """What a peer's `connect` needs."""
        return bytes(encode(self._ours))

    async def connect(self, metadata: bytes) -> Connection:
        """The connection to a peer; the same one when it's asked for again.

        A connection to an earlier incarnation of the worker is dropped. Raises TransferError if
        the two agents don't fit together, or the peer's address can't be used.
        """
        theirs = decode_metadata(metadata)
        self._check_fit(theirs)
        known = self._connections.get(theirs.tag_namespace)
        if known is not None:
            return known
        for stale in [c for c in self._connections.values() if c.worker_id == theirs.worker_id]:
            self.drop_peer(stale.worker_id, stale.incarnation)
        connection = Connection(
            ours=self._ours,
            theirs=theirs,
            lane=self._transport.connect(theirs.address),
            region=self._region,
            config=self._config,
            receiver=self._receiver,
        )
        self._connections[theirs.tag_namespace] = connection
        return connection

    def expect(
        self,
        ticket_id: TicketId,
        *,
        attempt: int,
        sender_incarnation: Incarnation,
        block_ids: Sequence[int],
    ) -> None:
        """Lets one sender incarnation write into exactly these blocks, under this attempt.

        Raises TransferError if the ticket is open already, a block is outside the region, or
        another ticket's.
        """
        self._receiver.expect(
            ticket_id,
            attempt=attempt,
            sender_incarnation=sender_incarnation,
            block_ids=block_ids,
        )

    async def close_ticket(self, ticket_id: TicketId) -> None:
        """Accepts nothing more under the ticket; unknown tickets are closed already.

        Returns when no receive into its blocks is in flight, or its sender was dropped.
        """
        await self._receiver.close_ticket(ticket_id)

    def drop_peer(self, worker_id: WorkerId, incarnation: Incarnation) -> list[TicketId]:
        """Ends the connection to a peer that is lost: its operations fail, its tickets are closed.

        Returns the tickets whose blocks may still be written, because a receive is in flight that
        needs the peer to go on. That never happens where this process reads the peer's memory (one
        host with UCX's `cma`), nor on a device, so the list is nearly always empty. Blocks of the
        tickets in it need quarantine until the peer's process is known to be gone; all others are
        safe at once.
        """
        for namespace, connection in self._connections.items():
            if (connection.worker_id, connection.incarnation) == (worker_id, incarnation):
                del self._connections[namespace]
                return connection.drop(f"The connection to worker {worker_id} was dropped.")
        return []

    @property
    def counters(self) -> Mapping[WorkerId, PeerCounters]:
        """Of each connected peer."""
        return {c.worker_id: c.counters for c in self._connections.values()}

    async def close(self) -> None:
        """Drops all peers and frees the transport."""
        for connection in list(self._connections.values()):
            self.drop_peer(connection.worker_id, connection.incarnation)
        await self._transport.close()

    def _on_arrival(self, arrival: Arrival) -> None:
        tag = unpack_tag(arrival.tag)
        connection = None if tag is None else self._connections.get(tag.namespace)
        if tag is None or connection is None:
            arrival.discard()
        else:
            connection.on_arrival(tag, arrival)

    def _check_fit(self, theirs: AgentMetadata) -> None:
        ours = self._ours
        peer = f"worker {theirs.worker_id}"
        if theirs.transport != ours.transport:
            raise TransferError(
                f"This worker transfers KV by {ours.transport}, {peer} by {theirs.transport}."
            )
        if theirs.block_bytes != ours.block_bytes:
            raise TransferError(
                f"KV blocks have {ours.block_bytes} bytes here and {theirs.block_bytes} at {peer}."
            )
        if theirs.tag_namespace == ours.tag_namespace:
            raise TransferError(f"{peer} has this worker's own tag namespace.")
        known = self._connections.get(theirs.tag_namespace)
        if known is not None and (known.worker_id, known.incarnation) != (
            theirs.worker_id,
            theirs.incarnation,
        ):
            raise TransferError(
                f"{peer} has the tag namespace of worker {known.worker_id}; restart one of them."
            )
