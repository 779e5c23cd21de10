"""The sending side of one connection: writes, their window, and how they end."""

import asyncio
import itertools
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from kvtransfer.block_ids import BlockIds, pack_block_ids, to_block_ids
from kvtransfer.buffer import Buffer
from kvtransfer.checksum import crc32_of
from kvtransfer.config import TransferConfig
from kvtransfer.counters import DirectionCounters
from kvtransfer.plan import (
    MAX_BLOCKS_PER_READ,
    PlannedMessage,
    plan_messages,
    runs_of,
    split_into_parts,
)
from kvtransfer.region import Region
from kvtransfer.staging import StagingPool
from kvtransfer.tags import SEQUENCE_MASK
from kvtransfer.transport import OnDone
from kvtransfer.wire import (
    AgentMessage,
    DataMessage,
    ReadPart,
    WithdrawWrite,
    WriteDone,
    WritePart,
    WriteRefused,
)
from protocol.errors import TransferCancelledError, TransferError, TransferTimeoutError
from protocol.ids import Incarnation, TicketId


@dataclass(frozen=True, slots=True)
class WriteTarget:
    """What a write is for; the receiver's fence checks every field."""

    ticket_id: TicketId
    attempt: int
    receiver_incarnation: Incarnation
    write_seq: int


@dataclass(eq=False, slots=True)
class _Write:
    write_id: int
    target: WriteTarget
    num_sending: int = 0
    """Messages that are read from our blocks; one for all that the peer reads by itself."""
    is_read_by_peer: bool = False
    is_done: bool = False
    error: TransferError | None = None

    @property
    def is_settled(self) -> bool:
        return self.is_done or self.error is not None

    def fail(self, error: TransferError) -> None:
        if not self.is_settled:
            self.error = error


class WriteSender:
    """Pushes blocks of `region` to one peer.

    `is_read_by_peer` tells, before each write, whether the peer reads our pool itself.
    `send_control` and `send_data(buffer, sequence, on_done)` put messages on the peer's lane.
    """

    def __init__(
        self,
        region: Region,
        config: TransferConfig,
        counters: DirectionCounters,
        *,
        send_control: Callable[[AgentMessage], None],
        send_data: Callable[[Buffer, int, OnDone], None],
        is_read_by_peer: Callable[[], Awaitable[bool]],
    ) -> None:
        self._region = region
        self._config = config
        self._limits = config.limits(region.block_bytes)
        self._counters = counters
        self._send_control = send_control
        self._send_data = send_data
        self._is_read_by_peer = is_read_by_peer
        self._staging = StagingPool(
            region.allocate,
            buffer_bytes=max(config.gathered_message_bytes, region.block_bytes),
            max_idle=config.max_idle_staging_buffers,
        )
        self._writes: dict[int, _Write] = {}
        self._write_ids = itertools.count(1)
        self._next_sequence = 0
        self._num_bytes_sending = 0
        self._closed: TransferCancelledError | None = None
        self._progress = asyncio.Event()

    async def write(
        self, target: WriteTarget, src_blocks: Sequence[int], dst_blocks: Sequence[int]
    ) -> None:
        """See Connection.write."""
        if self._closed is not None:
            raise self._closed
        if len(src_blocks) != len(dst_blocks):
            raise TransferError(f"{len(src_blocks)} blocks can't go to {len(dst_blocks)} places.")
        src_ids = to_block_ids(src_blocks)
        self._region.check_range(src_ids)
        write = _Write(next(self._write_ids), target)
        self._writes[write.write_id] = write
        start = time.monotonic()
        try:
            if await self._is_read_by_peer():
                self._announce_reads(write, src_ids, to_block_ids(dst_blocks))
            else:
                for part, is_last in self._parts(src_blocks, dst_blocks):
                    await self._send_part(write, part, is_last=is_last)
            await self._wait(lambda: write.is_settled and not write.num_sending)
        except BaseException:
            write.fail(TransferCancelledError("the write was given up"))
            raise
        finally:
            self._forget_if_ended(write)
        if write.error is not None:
            raise write.error
        self._counters.add(len(src_blocks) * self._region.block_bytes, time.monotonic() - start)

    async def cancel(self, ticket_id: TicketId) -> None:
        """See Connection.cancel."""
        writes = [w for w in self._writes.values() if w.target.ticket_id == ticket_id]
        for write in writes:
            write.fail(TransferCancelledError(f"The write under ticket {ticket_id} was cancelled."))
            if write.is_read_by_peer:
                self._send_control(WithdrawWrite(write.write_id))
        self._notify()
        await self._wait(lambda: not any(write.num_sending for write in writes))

    def on_outcome(self, message: WriteDone | WriteRefused) -> None:
        """Takes the receiver's answer; answers to writes that ended here already are void."""
        write = self._writes.get(message.write_id)
        if write is None:
            return
        if write.is_read_by_peer:
            write.num_sending = 0
        if isinstance(message, WriteRefused):
            write.fail(TransferError(f"The receiver refused the write: {message.reason}."))
        elif write.error is None:
            write.is_done = True
        self._forget_if_ended(write)
        self._notify()

    def close(self, error: TransferCancelledError) -> None:
        """Fails all writes at once; the lane must end their sends."""
        self._closed = error
        for write in self._writes.values():
            write.fail(error)
            if write.is_read_by_peer:
                write.num_sending = 0
        self._notify()

    def allocate_sequences(self, count: int) -> int:
        """The first of `count` numbers for data messages; they count modulo 2²⁸."""
        first = self._next_sequence
        self._next_sequence = (first + count) & SEQUENCE_MASK
        return first

    def _parts(
        self, src_blocks: Sequence[int], dst_blocks: Sequence[int]
    ) -> list[tuple[list[PlannedMessage], bool]]:
        parts = split_into_parts(plan_messages(src_blocks, dst_blocks, self._limits))
        return [(part, part is parts[-1]) for part in parts]

    def _announce_reads(self, write: _Write, src_ids: BlockIds, dst_ids: BlockIds) -> None:
        if write.is_settled:
            return
        write.is_read_by_peer = True
        write.num_sending = 1
        target = write.target
        num_blocks = len(src_ids)
        for at in range(0, max(1, num_blocks), MAX_BLOCKS_PER_READ):
            piece = slice(at, at + MAX_BLOCKS_PER_READ)
            src = src_ids[piece]
            self._send_control(
                ReadPart(
                    write.write_id,
                    target.ticket_id,
                    target.attempt,
                    target.receiver_incarnation,
                    target.write_seq,
                    pack_block_ids(src),
                    pack_block_ids(dst_ids[piece]),
                    is_last=at + MAX_BLOCKS_PER_READ >= num_blocks,
                    crc32=self._checksum(src),
                )
            )

    async def _send_part(
        self, write: _Write, messages: list[PlannedMessage], *, is_last: bool
    ) -> None:
        if write.is_settled:
            return
        first_sequence = self.allocate_sequences(len(messages))
        self._send_control(
            WritePart(
                write.write_id,
                write.target.ticket_id,
                write.target.attempt,
                write.target.receiver_incarnation,
                write.target.write_seq,
                first_sequence,
                [self._announcement(message) for message in messages],
                is_last,
            )
        )
        for sequence, message in enumerate(messages, first_sequence):
            num_bytes = message.num_blocks * self._region.block_bytes
            await self._wait(lambda size=num_bytes: write.is_settled or self._has_room(size))
            if write.is_settled:
                return
            self._send_message(write, message, sequence & SEQUENCE_MASK)

    def _announcement(self, message: PlannedMessage) -> DataMessage:
        checksum = None
        if self._config.verify_checksums:
            checksum = crc32_of(self._region, message.src_runs)
        return DataMessage(list(message.dst_runs), checksum)

    def _checksum(self, block_ids: BlockIds) -> int | None:
        if not self._config.verify_checksums:
            return None
        return crc32_of(self._region, runs_of(block_ids.tolist()))

    def _has_room(self, num_bytes: int) -> bool:
        under_way = self._num_bytes_sending
        return not under_way or under_way + num_bytes <= self._config.window_bytes

    def _send_message(self, write: _Write, message: PlannedMessage, sequence: int) -> None:
        staging = None
        if len(message.src_runs) == 1:
            buffer = self._region.view(message.src_runs[0])
        else:
            staging = self._staging.take(message.num_blocks * self._region.block_bytes)
            buffer = staging[: self._region.gather(message.src_runs, staging)]
        write.num_sending += 1
        self._num_bytes_sending += buffer.nbytes

        def on_done(error: str | None) -> None:
            write.num_sending -= 1
            self._num_bytes_sending -= buffer.nbytes
            if staging is not None:
                self._staging.give_back(staging)
            if error is not None:
                write.fail(TransferError(f"Sending KV blocks failed: {error}."))
            self._forget_if_ended(write)
            self._notify()

        self._send_data(buffer, sequence, on_done)

    def _forget_if_ended(self, write: _Write) -> None:
        # A write whose task was cancelled stays known until its blocks are free of readers, so
        # that `cancel` can wait for it.
        if write.is_settled and not write.num_sending:
            self._writes.pop(write.write_id, None)

    def _notify(self) -> None:
        """Wakes everyone who waits; each looks again at what it waits for."""
        progress, self._progress = self._progress, asyncio.Event()
        progress.set()

    async def _wait(self, condition: Callable[[], bool]) -> None:
        while not condition():
            try:
                async with asyncio.timeout(self._config.stall_timeout_s):
                    await self._progress.wait()
            except TimeoutError as error:
                raise TransferTimeoutError(
                    f"No transfer to this peer made progress for {self._config.stall_timeout_s} s."
                ) from error
