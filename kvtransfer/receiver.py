"""The receiving side: checks every announced write against the fences and puts it in place."""

from collections.abc import Callable, Sequence

from kvtransfer.block_ids import to_block_ids
from kvtransfer.checksum import checksum_error
from kvtransfer.config import TransferConfig
from kvtransfer.fence import Fence, FenceTable
from kvtransfer.incoming_reads import IncomingReads
from kvtransfer.incoming_write import IncomingWrite, IncomingWrites, WriteReceived, WriteSource
from kvtransfer.region import Region, Run
from kvtransfer.staging import StagingPool
from kvtransfer.tags import SEQUENCE_MASK
from kvtransfer.transport import Arrival
from kvtransfer.wire import DataMessage, WritePart
from protocol.ids import Incarnation, TicketId


class WriteReceiver:
    """All incoming writes of one region, by messages or by `reads`."""

    def __init__(
        self,
        region: Region,
        *,
        incarnation: Incarnation,
        config: TransferConfig,
        on_write: Callable[[WriteReceived], None],
    ) -> None:
        self._region = region
        self._config = config
        self._fences = FenceTable()
        self._writes = IncomingWrites(self._fences, incarnation=incarnation, on_write=on_write)
        self.reads = IncomingReads(
            region, self._fences, self._writes, verify_checksums=config.verify_checksums
        )
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
        self._region.check_range(to_block_ids(block_ids))
        self._fences.add(Fence(ticket_id, attempt, sender_incarnation, frozenset(block_ids)))

    async def close_ticket(self, ticket_id: TicketId) -> None:
        """See TransferAgent.close_ticket."""
        fence = self._fences.get(ticket_id)
        if fence is None:
            return
        self._fences.close(fence)
        self._writes.fail_all(fence, f"the receiver closed ticket {ticket_id}")
        await fence.gone.wait()

    def stop(self, source: WriteSource) -> None:
        """Accepts nothing more from a peer."""
        for fence in self._fences.of_sender(source.incarnation):
            self._fences.close(fence)
            self._writes.fail_all(fence, "the sender was dropped")

    def abandon(self, source: WriteSource) -> list[TicketId]:
        """Ends a stopped peer's tickets; returns those with a receive still in flight."""
        fences = self._fences.of_sender(source.incarnation)
        return [fence.ticket_id for fence in fences if self._fences.abandon(fence)]

    def on_part(self, source: WriteSource, part: WritePart) -> None:
        """Opens the places for a part's messages, or refuses the write."""
        write = self._writes.accept(
            source,
            part,
            lambda fence: fence.refusal_of_messages([m.dst_runs for m in part.messages]),
        )
        if write is None:
            return
        for sequence, message in enumerate(part.messages, part.first_sequence):
            self._writes.expected[source.incarnation, sequence & SEQUENCE_MASK] = write, message
        write.num_missing += len(part.messages)
        self._writes.finish_if_complete(write)

    def on_data(self, source: WriteSource, sequence: int, arrival: Arrival) -> None:
        """Gives a data message its place; one that wasn't announced and accepted has none."""
        expected = self._writes.expected.pop((source.incarnation, sequence), None)
        if expected is None:
            arrival.discard()
            return
        write, message = expected
        num_bytes = _num_blocks(message.dst_runs) * self._region.block_bytes
        if arrival.num_bytes != num_bytes:
            arrival.discard()
            reason = f"{arrival.num_bytes} bytes came where {num_bytes} were announced"
            self._writes.fail(write, reason)
            return
        self._receive(write, message, arrival)

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
                error = error or self._checksum_error(message)
                self._writes.take(write, arrival.num_bytes, error)

        if staging is None:
            self._fences.begin_receive(write.fence)
        arrival.receive_into(target, on_done)

    def _checksum_error(self, message: DataMessage) -> str | None:
        if not self._config.verify_checksums:
            return None
        return checksum_error(self._region, message.dst_runs, message.crc32)


def _num_blocks(runs: Sequence[Run]) -> int:
    return sum(count for _, count in runs)
