"""The receiving side: checks every announced write against the fences and puts it in place."""

import time
from collections.abc import Callable, Sequence

import numpy as np

from kvtransfer.checksum import checksum_error
from kvtransfer.config import TransferConfig
from kvtransfer.fence import Fence, FenceTable
from kvtransfer.incoming_write import IncomingWrite, WriteReceived, WriteSource
from kvtransfer.plan import runs_of
from kvtransfer.pool_reader import PoolReader
from kvtransfer.region import Region, Run
from kvtransfer.staging import StagingPool
from kvtransfer.tags import SEQUENCE_MASK
from kvtransfer.transport import Arrival
from kvtransfer.wire import (
    DataMessage,
    ReadPart,
    WriteDone,
    WritePart,
    WriteRefused,
    unpack_block_ids,
)
from protocol.errors import TransferError
from protocol.ids import Incarnation, TicketId

MIN_READ_BYTES = 256 << 20
"""To start a copy takes as long as to copy this much, so parts of a write wait for each other."""

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
        self._writes: dict[_MessageKey, IncomingWrite] = {}
        self._expected: dict[_MessageKey, tuple[IncomingWrite, DataMessage]] = {}
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
        write = self._accept(
            source,
            part,
            lambda fence: fence.refusal_of_messages([m.dst_runs for m in part.messages]),
        )
        if write is None:
            return
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

    def on_read_part(self, source: WriteSource, part: ReadPart) -> None:
        """Starts to copy blocks from the sender's pool, or refuses the write."""
        reader = source.reader
        if reader is None:
            source.reply(WriteRefused(part.write_id, "the sender's pool is not mapped here"))
            return
        try:
            src_ids, dst_ids = (unpack_block_ids(ids) for ids in (part.src_blocks, part.dst_blocks))
        except TransferError as error:
            source.reply(WriteRefused(part.write_id, str(error)))
            return
        if len(src_ids) and int(src_ids.max()) >= reader.num_blocks:
            source.reply(WriteRefused(part.write_id, "a block is outside the sender's pool"))
            return
        write = self._accept(source, part, lambda fence: fence.refusal_of_blocks(dst_ids))
        if write is None:
            return
        if len(src_ids) != len(dst_ids):
            self._fail(write, f"{len(src_ids)} blocks were announced for {len(dst_ids)} places")
            return
        write.is_complete_announced = part.is_last
        write.to_read.append((src_ids, dst_ids))
        write.num_bytes_to_read += len(dst_ids) * self._region.block_bytes
        is_enough = write.num_bytes_to_read >= MIN_READ_BYTES
        if part.is_last or part.crc32 is not None or is_enough:
            self._read(write, reader, part.crc32)

    def on_withdraw(self, source: WriteSource, write_id: int) -> None:
        """Ends a write whose sender wants its blocks back; if it's unknown, its answer is sent."""
        write = self._writes.get((source.incarnation, write_id))
        if write is not None:
            self._fail(write, "the sender gave it up")

    def _read(self, write: IncomingWrite, reader: PoolReader, crc32: int | None) -> None:
        """Copies what was announced so far."""
        src_ids, dst_ids = (np.concatenate(ids) for ids in zip(*write.to_read, strict=True))
        write.to_read.clear()
        write.num_bytes_to_read = 0
        if not len(dst_ids):
            self._finish_if_complete(write)
            return
        write.num_missing += 1
        write.num_reading += 1
        self._fences.begin_receive(write.fence)

        def on_done() -> None:
            self._fences.end_receive(write.fence)
            write.num_reading -= 1
            if write.is_failed:
                self._answer_failure(write)
            else:
                self._on_read(write, dst_ids.tolist(), crc32)

        reader.read(src_ids, dst_ids, on_done)

    def _receive(self, write: IncomingWrite, message: DataMessage, arrival: Arrival) -> None:
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

    def _on_read(self, write: IncomingWrite, block_ids: Sequence[int], crc32: int | None) -> None:
        error = None
        if self._config.verify_checksums:
            error = checksum_error(self._region, runs_of(block_ids), crc32)
        self._count(write, len(block_ids) * self._region.block_bytes, error)

    def _on_received(
        self, write: IncomingWrite, message: DataMessage, num_bytes: int, error: str | None
    ) -> None:
        if error is None and self._config.verify_checksums:
            error = checksum_error(self._region, message.dst_runs, message.crc32)
        self._count(write, num_bytes, error)

    def _count(self, write: IncomingWrite, num_bytes: int, error: str | None) -> None:
        """Takes the end of one message or read."""
        if error is not None:
            self._fail(write, error)
            return
        write.num_bytes += num_bytes
        write.num_missing -= 1
        self._finish_if_complete(write)

    def _finish_if_complete(self, write: IncomingWrite) -> None:
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

    def _accept(
        self,
        source: WriteSource,
        part: WritePart | ReadPart,
        refusal_of_content: Callable[[Fence], str | None],
    ) -> IncomingWrite | None:
        """The write that the part belongs to, perhaps a new one; None if it's refused."""
        key = (source.incarnation, part.write_id)
        write = self._writes.get(key)
        if write is not None and write.is_failed:
            return None  # it's answered when nothing is read any more
        fence = self._fences.get(part.ticket_id)
        refusal = self._refusal(source, part, write)
        if refusal is None:
            assert fence is not None, "it was just checked"
            refusal = refusal_of_content(fence)
        if refusal is not None:
            if write is None:
                source.reply(WriteRefused(part.write_id, refusal))
            else:
                self._fail(write, refusal)
            return None
        if write is None:
            assert fence is not None, "it was just checked"
            fence.write_seqs.add(part.write_seq)
            write = IncomingWrite(
                source, part.write_id, part.write_seq, fence, started=time.monotonic()
            )
            self._writes[key] = write
        return write

    def _refusal(
        self, source: WriteSource, part: WritePart | ReadPart, write: IncomingWrite | None
    ) -> str | None:
        if part.receiver_incarnation != self._incarnation:
            return "the write is for another incarnation of this worker"
        refusal = self._fences.refusal(
            ticket_id=part.ticket_id,
            attempt=part.attempt,
            sender_incarnation=source.incarnation,
        )
        if refusal is not None:
            return refusal
        fence = self._fences.get(part.ticket_id)
        if write is None and fence is not None and part.write_seq in fence.write_seqs:
            return f"write {part.write_seq} of ticket {part.ticket_id} was made before"
        if write is not None and write.fence is not fence:
            return "the write's parts name different tickets"
        return None

    def _fail_writes(self, fence: Fence, reason: str) -> None:
        for write in [w for w in self._writes.values() if w.fence is fence]:
            self._fail(write, reason)

    def _fail(self, write: IncomingWrite, reason: str) -> None:
        if write.is_failed:
            return
        write.refusal = reason
        for key in [key for key, (owner, _) in self._expected.items() if owner is write]:
            del self._expected[key]
        self._answer_failure(write)

    def _answer_failure(self, write: IncomingWrite) -> None:
        """Tells the sender, which may then reuse its blocks: nothing is read any more."""
        assert write.refusal is not None, "it has failed"
        if write.num_reading == 0:
            del self._writes[write.source.incarnation, write.write_id]
            write.source.reply(WriteRefused(write.write_id, write.refusal))


def _num_blocks(runs: Sequence[Run]) -> int:
    return sum(count for _, count in runs)
