"""One peer: writes to it, messages from it, and the speed of the way between."""

from collections.abc import Sequence

from kvtransfer.buffer import Buffer
from kvtransfer.config import TransferConfig
from kvtransfer.counters import DirectionCounters, PeerCounters
from kvtransfer.host import is_same_host
from kvtransfer.inbox import Inbox
from kvtransfer.outgoing import WriteSender, WriteTarget
from kvtransfer.pool_offer import PoolOffer
from kvtransfer.pool_reader import PoolReader
from kvtransfer.probe import PathProbe, PathReport, judge_path
from kvtransfer.receiver import WriteReceiver
from kvtransfer.region import Region
from kvtransfer.tags import MessageKind, Tag, pack_tag
from kvtransfer.transport import Arrival, Lane, OnDone
from kvtransfer.wire import (
    AgentMessage,
    AgentMetadata,
    OfferPool,
    PoolMapped,
    ProbeDone,
    ProbeRead,
    ProbeStart,
    ReadPart,
    WithdrawWrite,
    WriteDone,
    WritePart,
    WriteRefused,
    encode,
)
from protocol.errors import TransferCancelledError
from protocol.ids import Incarnation, TicketId


class Connection:
    """Made by `TransferAgent.connect`; both directions between two agents."""

    def __init__(
        self,
        *,
        ours: AgentMetadata,
        theirs: AgentMetadata,
        lane: Lane,
        region: Region,
        config: TransferConfig,
        receiver: WriteReceiver,
    ) -> None:
        self.worker_id = theirs.worker_id
        self.incarnation = theirs.incarnation
        self.counters = PeerCounters(DirectionCounters(), DirectionCounters())
        self._ours = ours
        self._theirs = theirs
        self._lane = lane
        self._region = region
        self._config = config
        self._receiver = receiver
        self._is_open = True
        self._reader: PoolReader | None = None
        self._offer = PoolOffer(
            region.export() if config.read_peers_pools else None,
            send_control=self.reply,
            timeout_s=config.stall_timeout_s,
        )
        self._sender = WriteSender(
            region,
            config,
            self.counters.sent,
            send_control=self.reply,
            send_data=self._send_data,
            is_read_by_peer=self._offer.is_accepted,
        )
        self._probe = PathProbe(
            allocate=region.allocate,
            block_bytes=region.block_bytes,
            num_blocks=region.num_blocks,
            send_control=self.reply,
            send_data=self._send_data,
            allocate_sequence=lambda: self._sender.allocate_sequences(1),
        )
        self._inbox = Inbox(on_control=self._on_control, on_data=self._on_data)

    @property
    def is_open(self) -> bool:
        return self._is_open

    @property
    def reader(self) -> PoolReader | None:
        """Of the peer's pool, if it's mapped here."""
        return self._reader

    async def write(
        self,
        *,
        ticket_id: TicketId,
        attempt: int,
        receiver_incarnation: Incarnation,
        src_blocks: Sequence[int],
        dst_blocks: Sequence[int],
        write_seq: int,
    ) -> None:
        """Copies our blocks `src_blocks[i]` to the peer's `dst_blocks[i]`.

        Returns when all bytes are in place there, the peer's `on_write` was called with
        `write_seq`, and the source blocks may be reused. `write_seq` names the write within its
        ticket; a number can't be used twice.

        Raises TransferError if the peer's fence refuses (unknown ticket, stale attempt or
        incarnation, foreign block: nothing was written then) or the transport fails,
        TransferCancelledError if `cancel` or `drop_peer` ended it, TransferTimeoutError if nothing
        moved for `stall_timeout_s`. After an error, await `cancel(ticket_id)` before reusing the
        source blocks.
        """
        target = WriteTarget(ticket_id, attempt, receiver_incarnation, write_seq)
        await self._sender.write(target, src_blocks, dst_blocks)

    async def cancel(self, ticket_id: TicketId) -> None:
        """Fails this ticket's writes; returns when the peer reads none of their blocks any more."""
        await self._sender.cancel(ticket_id)

    async def measure(self) -> PathReport:
        """Moves some megabytes into the peer's scratch memory a few times, for about 60 ms.

        Raises TransferTimeoutError if the peer doesn't answer.
        """
        rates = await self._probe.measure(is_read_by_peer=await self._offer.is_accepted())
        self.counters.sent.observe_rate(rates.round_trip)
        return judge_path(self._ours.transport, rates, self._ours.host, self._theirs.host)

    def on_arrival(self, tag: Tag, arrival: Arrival) -> None:
        """Takes a message that bears the peer's namespace."""
        self._inbox.push(tag, arrival)

    def reply(self, message: AgentMessage) -> None:
        """Puts a control message on the lane."""
        if self._is_open:
            tag = pack_tag(Tag(self._ours.tag_namespace, MessageKind.CONTROL, 0))
            self._lane.send(memoryview(encode(message)), tag, _ignore)

    def drop(self, reason: str) -> list[TicketId]:
        """See TransferAgent.drop_peer."""
        if not self._is_open:
            return []
        self._is_open = False
        self._sender.close(TransferCancelledError(reason))
        self._offer.close()
        self._probe.close(reason)
        self._inbox.close()
        self._receiver.stop(self)
        if self._reader is not None:
            self._reader.close()
        self._lane.close()
        return self._receiver.abandon(self)

    def _send_data(self, buffer: Buffer, sequence: int, on_done: OnDone) -> None:
        tag = pack_tag(Tag(self._ours.tag_namespace, MessageKind.DATA, sequence))
        self._lane.send(buffer, tag, on_done)

    def _on_data(self, sequence: int, arrival: Arrival) -> None:
        if not self._probe.take(sequence, arrival):
            self._receiver.on_data(self, sequence, arrival)

    def _on_control(self, message: AgentMessage) -> None:
        match message:
            case WritePart():
                self._receiver.on_part(self, message)
            case WriteDone() | WriteRefused():
                self._sender.on_outcome(message)
            case OfferPool(exported):
                self._map_pool(exported)
            case PoolMapped():
                self._offer.on_answer(message)
            case ReadPart():
                self._receiver.reads.on_part(self, message)
            case WithdrawWrite(write_id):
                self._receiver.reads.on_withdraw(self, write_id)
            case ProbeStart():
                self._probe.on_start(message)
            case ProbeRead():
                self._probe.on_read(message, self._reader)
            case ProbeDone():
                self._probe.on_done(message)

    def _map_pool(self, exported: bytes) -> None:
        # A handle of another host's memory says nothing here.
        is_near = is_same_host(self._ours.host, self._theirs.host)
        if self._reader is None and self._config.read_peers_pools and is_near:
            pool = self._region.map(exported)
            self._reader = None if pool is None else PoolReader(pool)
        self.reply(PoolMapped(self._reader is not None))


def _ignore(_: str | None) -> None:
    """A control message that can't be sent means a dead peer, and others notice that."""
