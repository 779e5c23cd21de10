"""The receiving side: checks every announced write against the fences and puts it in place."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from kvtransfer.checksum import crc32_of
from kvtransfer.config import TransferConfig
from kvtransfer.counters import PeerCounters
from kvtransfer.fence import Fence, FenceTable
from kvtransfer.region import Region, Run
from kvtransfer.staging import StagingPool
from kvtransfer.tags import SEQUENCE_MASK
from kvtransfer.transport import Arrival
from kvtransfer.wire import AgentMessage, DataMessage, WriteDone, WritePart, WriteRefused
from protocol.ids import Incarnation, TicketId, WorkerId


@dataclass(frozen=True, slots=True)
class WriteReceived:
    """A write whose bytes are all in place. `seconds` run from its announcement to that moment."""

    ticket_id: TicketId
    write_seq: int
    sender: WorkerId
    num_bytes: int
    seconds: float


class WriteSource(Protocol):
    """The connection that writes come from."""

    @property
    def worker_id(self) -> WorkerId: ...

    @property
    def incarnation(self) -> Incarnation: ...

    @property
    def counters(self) -> PeerCounters: ...

    def reply(self, message: AgentMessage) -> None: ...


@dataclass(eq=False, slots=True)
class _IncomingWrite:
    source: WriteSource
    write_id: int
    write_seq: int
    fence: Fence
    started: float
    num_bytes: int = 0
    num_missing: int = 0
    is_complete_announced: bool = False
    is_failed: bool = False


_MessageKey = tuple[Incarnation, int]


class WriteReceiver:
    """All incoming writes of one region."""

    def __init__(
        self,
        region: Region,
        *,
        incarnation: Incarnation,
        config: TransferConfig,
        on_write: Callable[[WriteReceived], None],
    ) -> None:
        self._region = region
        self._incarnation = incarnation
        self._config = config
        self._on_write = on_write
        self._fences = FenceTable()
        self._writes: dict[_MessageKey, _IncomingWrite] = {}
        self._expected: dict[_MessageKey, tuple[_IncomingWrite, DataMessage]] = {}
        self._staging = StagingPool(
            region.allocate,
            buffer_bytes=max(config.gathered_message_bytes, region.block_bytes),
            max_idle=config.max_idle_staging_buffers,
        )

    def expect(
        self,
        ticket_id: TicketId,
        *,
        attempt: int,
        sender_incarnation: Incarnation,
        block_ids: Sequence[int],
    ) -> None:
        """See TransferAgent.expect."""
        self._region.check_range(block_ids)
        self._fences.add(Fence(ticket_id, attempt, sender_incarnation, frozenset(block_ids)))

    async def close_ticket(self, ticket_id: TicketId) -> None:
        """See TransferAgent.close_ticket."""
        fence = self._fences.get(ticket_id)
        if fence is None:
            return
        self._fences.close(fence)
        self._fail_writes(fence, f"the receiver closed ticket {ticket_id}")
        await fence.gone.wait()

    def stop(self, source: WriteSource) -> None:
        """Accepts nothing more from a peer."""
        for fence in self._fences.of_sender(source.incarnation):
            self._fences.close(fence)
            self._fail_writes(fence, "the sender was dropped")

    def abandon(self, source: WriteSource) -> list[TicketId]:
        """Ends a stopped peer's tickets; returns those with a receive still in flight."""
        fences = self._fences.of_sender(source.incarnation)
        return [fence.ticket_id for fence in fences if self._fences.abandon(fence)]

    def on_part(self, source: WriteSource, part: WritePart) -> None:
        """Opens the places for a part's messages, or refuses the write."""
        key = (source.incarnation, part.write_id)
        write = self._writes.get(key)
        refusal = self._refusal(source, part, write)
        if refusal is not None:
            if write is None:
                source.reply(WriteRefused(part.write_id, refusal))
            else:
                self._fail(write, refusal)
            return
        if write is None:
            fence = self._fences.get(part.ticket_id)
            assert fence is not None, "the fence was just checked"
            fence.write_seqs.add(part.write_seq)
            write = _IncomingWrite(
                source, part.write_id, part.write_seq, fence, started=time.monotonic()
            )
            self._writes[key] = write
        for sequence, message in enumerate(part.messages, part.first_sequence):
            self._expected[source.incarnation, sequence & SEQUENCE_MASK] = write, message
        write.num_missing += len(part.messages)
        write.is_complete_announced = part.is_last
        self._finish_if_complete(write)

    def on_data(self, source: WriteSource, sequence: int, arrival: Arrival) -> None:
        """Gives a data message its place; one that wasn't announced and accepted has none."""
        expected = self._expected.pop((source.incarnation, sequence), None)
        if expected is None:
            arrival.discard()
            return
        write, message = expected
        num_bytes = _num_blocks(message.dst_runs) * self._region.block_bytes
        if arrival.num_bytes != num_bytes:
            arrival.discard()
            self._fail(write, f"{arrival.num_bytes} bytes came where {num_bytes} were announced")
            return
        self._receive(write, message, arrival)

    def _receive(self, write: _IncomingWrite, message: DataMessage, arrival: Arrival) -> None:
        is_direct = len(message.dst_runs) == 1 and not self._region.peers_write
        staging = None if is_direct else self._staging.take(arrival.num_bytes)
        if staging is None:
            target = self._region.view(message.dst_runs[0])
        else:
            target = staging[: arrival.num_bytes]

        def on_done(error: str | None) -> None:
            if staging is None:
                self._fences.end_receive(write.fence)
            else:
                if error is None and not write.is_failed:
                    self._region.scatter(target, message.dst_runs)
                # After a failure the peer may still write into it; see `Region.peers_write`.
                if error is None or not self._region.peers_write:
                    self._staging.give_back(staging)
            if not write.is_failed:
                self._on_received(write, message, arrival.num_bytes, error)

        if staging is None:
            self._fences.begin_receive(write.fence)
        arrival.receive_into(target, on_done)

    def _on_received(
        self, write: _IncomingWrite, message: DataMessage, num_bytes: int, error: str | None
    ) -> None:
        if error is None and self._config.verify_checksums:
            error = self._checksum_error(message)
        if error is not None:
            self._fail(write, error)
            return
        write.num_bytes += num_bytes
        write.num_missing -= 1
        self._finish_if_complete(write)

    def _finish_if_complete(self, write: _IncomingWrite) -> None:
        if write.num_missing or not write.is_complete_announced:
            return
        del self._writes[write.source.incarnation, write.write_id]
        seconds = time.monotonic() - write.started
        write.source.counters.received.add(write.num_bytes, seconds)
        self._on_write(
            WriteReceived(
                write.fence.ticket_id,
                write.write_seq,
                write.source.worker_id,
                write.num_bytes,
                seconds,
            )
        )
        write.source.reply(WriteDone(write.write_id))

    def _refusal(
        self, source: WriteSource, part: WritePart, write: _IncomingWrite | None
    ) -> str | None:
        if part.receiver_incarnation != self._incarnation:
            return "the write is for another incarnation of this worker"
        refusal = self._fences.refusal(
            ticket_id=part.ticket_id,
            attempt=part.attempt,
            sender_incarnation=source.incarnation,
            messages_runs=[message.dst_runs for message in part.messages],
        )
        if refusal is not None:
            return refusal
        fence = self._fences.get(part.ticket_id)
        if write is None and fence is not None and part.write_seq in fence.write_seqs:
            return f"write {part.write_seq} of ticket {part.ticket_id} was made before"
        if write is not None and write.fence is not fence:
            return "the write's parts name different tickets"
        return None

    def _checksum_error(self, message: DataMessage) -> str | None:
        if message.crc32 is None:
            return "the sender made no checksum; both sides need the same setting"
        if message.crc32 == crc32_of(self._region, message.dst_runs):
            return None
        runs = ", ".join(f"{first}..{first + count - 1}" for first, count in message.dst_runs)
        return f"checksum mismatch in blocks {runs}"

    def _fail_writes(self, fence: Fence, reason: str) -> None:
        for write in [w for w in self._writes.values() if w.fence is fence]:
            self._fail(write, reason)

    def _fail(self, write: _IncomingWrite, reason: str) -> None:
        if write.is_failed:
            return
        write.is_failed = True
        del self._writes[write.source.incarnation, write.write_id]
        for key in [key for key, (owner, _) in self._expected.items() if owner is write]:
            del self._expected[key]
        write.source.reply(WriteRefused(write.write_id, reason))


def _num_blocks(runs: Sequence[Run]) -> int:
    return sum(count for _, count in runs)
