"""A write on its way into our blocks, and what its owner is told at its end."""

from dataclasses import dataclass, field
from typing import Protocol, TypeAlias

from kvtransfer.counters import PeerCounters
from kvtransfer.fence import Fence
from kvtransfer.pool_reader import BlockIds, PoolReader
from kvtransfer.wire import AgentMessage
from protocol.ids import Incarnation, TicketId, WorkerId

Pairs: TypeAlias = tuple[BlockIds, BlockIds]
"""Blocks to read, and the places that they go to."""


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
    to_read: list[Pairs] = field(default_factory=list[Pairs])
    """Announced, but not started."""
    num_bytes_to_read: int = 0
    is_complete_announced: bool = False
    refusal: str | None = None

    @property
    def is_failed(self) -> bool:
        return self.refusal is not None
