"""Writes on their way into our blocks: what is accepted, when they end, and who is told."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from kvtransfer.counters import PeerCounters
from kvtransfer.fence import Fence, FenceTable
from kvtransfer.pool_reader import PoolReader
from kvtransfer.wire import (
    AgentMessage,
    DataMessage,
    ReadPart,
    WriteDone,
    WritePart,
    WriteRefused,
)
from protocol.ids import Incarnation, TicketId, WorkerId

MessageKey = tuple[Incarnation, int]


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

    @property
    def reader(self) -> PoolReader | None:
        """Of the peer's pool, if it's mapped here."""
        ...

    def reply(self, message: AgentMessage) -> None: ...


@dataclass(eq=False, slots=True)
class IncomingWrite:
    """Announced and accepted, not yet answered."""

    source: WriteSource
    write_id: int
    write_seq: int
    fence: Fence
    started: float
    num_bytes: int = 0
    num_missing: int = 0
    num_reading: int = 0
    """Copies from the sender's own blocks, which it may not reuse before."""
    is_complete_announced: bool = False
    refusal: str | None = None

    @property
    def is_failed(self) -> bool:
        return self.refusal is not None


class IncomingWrites:
    """All writes of a region that are accepted and not answered."""

    def __init__(
        self,
        fences: FenceTable,
        *,
        incarnation: Incarnation,
        on_write: Callable[[WriteReceived], None],
    ) -> None:
        self.expected: dict[MessageKey, tuple[IncomingWrite, DataMessage]] = {}
        """Data messages that were announced and didn't come yet."""
        self._fences = fences
        self._incarnation = incarnation
        self._on_write = on_write
        self._writes: dict[MessageKey, IncomingWrite] = {}

    def find(self, source: WriteSource, write_id: int) -> IncomingWrite | None:
        return self._writes.get((source.incarnation, write_id))

    def accept(
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
            self.refuse(source, part.write_id, refusal)
            return None
        if write is None:
            assert fence is not None, "it was just checked"
            fence.write_seqs.add(part.write_seq)
            write = IncomingWrite(
                source, part.write_id, part.write_seq, fence, started=time.monotonic()
            )
            self._writes[key] = write
        write.is_complete_announced = part.is_last
        return write

    def refuse(self, source: WriteSource, write_id: int, reason: str) -> None:
        """Answers a part that can't be accepted, and with it all of its write."""
        write = self.find(source, write_id)
        if write is None:
            source.reply(WriteRefused(write_id, reason))
        else:
            self.fail(write, reason)

    def take(self, write: IncomingWrite, num_bytes: int, error: str | None) -> None:
        """Takes the end of one message or read."""
        if error is not None:
            self.fail(write, error)
            return
        write.num_bytes += num_bytes
        write.num_missing -= 1
        self.finish_if_complete(write)

    def finish_if_complete(self, write: IncomingWrite) -> None:
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

    def fail(self, write: IncomingWrite, reason: str) -> None:
        if write.is_failed:
            return
        write.refusal = reason
        for key in [key for key, (owner, _) in self.expected.items() if owner is write]:
            del self.expected[key]
        self.answer_failure(write)

    def fail_all(self, fence: Fence, reason: str) -> None:
        """Fails the writes into a fence's blocks."""
        for write in [w for w in self._writes.values() if w.fence is fence]:
            self.fail(write, reason)

    def answer_failure(self, write: IncomingWrite) -> None:
        """Tells the sender, which may then reuse its blocks: nothing is read any more."""
        assert write.refusal is not None, "it has failed"
        if write.num_reading == 0:
            del self._writes[write.source.incarnation, write.write_id]
            write.source.reply(WriteRefused(write.write_id, write.refusal))

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
