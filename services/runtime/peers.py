"""What one process knows of another: its state, its silence, and the events about it."""

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol, TypeAlias

import msgspec

from protocol.ids import Incarnation
from protocol.messages import ControlMessage


class PeerState(StrEnum):
    """CONNECTING and SUSPECT peers get no new work; only LOST ends what they have."""

    CONNECTING = "connecting"
    ALIVE = "alive"
    SUSPECT = "suspect"
    LOST = "lost"


class PeerSignal(StrEnum):
    GREETED = "greeted"
    HEARD = "heard"
    SILENT = "silent"
    GONE = "gone"


class LostReason(StrEnum):
    DISCONNECTED = "disconnected"
    SILENT = "silent"
    GOODBYE = "goodbye"
    UNREACHABLE = "unreachable"
    OVERFLOW = "overflow"
    UNREADABLE = "unreadable"
    OTHER_PROTOCOL = "other protocol version"
    OTHER_INCARNATION = "other incarnation"
    SUPERSEDED = "superseded"
    CLOSED = "closed here"


_TRANSITIONS: dict[tuple[PeerState, PeerSignal], PeerState] = {
    (PeerState.CONNECTING, PeerSignal.GREETED): PeerState.ALIVE,
    (PeerState.CONNECTING, PeerSignal.GONE): PeerState.LOST,
    (PeerState.ALIVE, PeerSignal.HEARD): PeerState.ALIVE,
    (PeerState.ALIVE, PeerSignal.SILENT): PeerState.SUSPECT,
    (PeerState.ALIVE, PeerSignal.GONE): PeerState.LOST,
    (PeerState.SUSPECT, PeerSignal.HEARD): PeerState.ALIVE,
    (PeerState.SUSPECT, PeerSignal.SILENT): PeerState.SUSPECT,
    (PeerState.SUSPECT, PeerSignal.GONE): PeerState.LOST,
}


def advance(state: PeerState, signal: PeerSignal) -> PeerState:
    """The next state; raises ValueError for a pair that has none (LOST is final)."""
    try:
        return _TRANSITIONS[state, signal]
    except KeyError:
        raise ValueError(f"a {state} peer can't be {signal}") from None


@dataclass(frozen=True, slots=True)
class ChannelTimings:
    """When silence means something.

    Two clocks watch a peer. ZMQ's own I/O threads ping each other without Python, so
    `transport_timeout_s` without an answer means a dead or stopped process, host or network; a
    killed process is noticed at once, because its kernel closes the connection. Heartbeats are
    sent by the event loop: their absence for `suspect_after_s` stops new work, and only
    `lost_after_s` gives the peer up, because a living process whose loop stalls (import,
    compilation, a starved core) comes back with all its requests.
    """

    heartbeat_interval_s: float = 0.2
    suspect_after_s: float = 0.8
    lost_after_s: float = 10.0
    transport_timeout_s: float = 3.0
    connect_timeout_s: float = 3.0
    send_queue_messages: int = 16384
    goodbye_linger_s: float = 0.5


@dataclass(frozen=True, slots=True)
class Identity:
    """Who this process is to its peers."""

    peer_id: str
    incarnation: Incarnation


class PeerLink(Protocol):
    """The channel end that a peer's messages leave by."""

    def transmit(self, peer: "Peer", message: ControlMessage) -> None: ...


class _Nowhere:
    def transmit(self, peer: "Peer", message: ControlMessage) -> None:
        raise AssertionError(f"{message} to {peer}, which is lost")


class Peer:
    """Another process, over one connection. A new connection to it makes a new Peer.

    `state` is for reading only. Not thread-safe: everything happens in the event loop's thread.
    """

    __slots__ = ("_link", "incarnation", "peer_id", "route", "silence_s", "state")

    def __init__(
        self, peer_id: str, incarnation: Incarnation, *, link: PeerLink, route: bytes = b""
    ) -> None:
        self.peer_id = peer_id
        self.incarnation = incarnation
        self.state = PeerState.CONNECTING
        self.silence_s = 0.0
        self.route = route
        self._link = link

    @classmethod
    def lost(cls, peer_id: str, incarnation: Incarnation) -> "Peer":
        """A peer to whom there was never a connection."""
        peer = cls(peer_id, incarnation, link=_Nowhere())
        peer.signal(PeerSignal.GONE)
        return peer

    def send(self, message: ControlMessage) -> bool:
        """Queues the message without waiting; False if the peer is LOST, now or before.

        Before the handshake ends messages wait, bounded. A peer whose queue is full becomes LOST.
        """
        if not self.is_lost:
            self._link.transmit(self, message)
        return not self.is_lost

    @property
    def is_lost(self) -> bool:
        return self.state is PeerState.LOST

    def signal(self, signal: PeerSignal) -> None:
        self.state = advance(self.state, signal)

    def heard(self) -> None:
        self.silence_s = 0.0
        if self.state is PeerState.SUSPECT:
            self.signal(PeerSignal.HEARD)

    def add_silence(self, elapsed_s: float, timings: ChannelTimings) -> bool:
        """True if the peer has now been silent for too long to be kept."""
        self.silence_s += elapsed_s
        if self.state is PeerState.CONNECTING:
            return self.silence_s > timings.connect_timeout_s
        if self.silence_s > timings.suspect_after_s:
            self.signal(PeerSignal.SILENT)
        return self.silence_s > timings.lost_after_s

    def __repr__(self) -> str:
        return f"Peer({self.peer_id}, {self.incarnation}, {self.state})"


@dataclass(frozen=True, slots=True)
class PeerUp:
    """The handshake with the peer is done."""

    peer: Peer


@dataclass(frozen=True, slots=True)
class PeerDown:
    """The peer is LOST; no message of this Peer follows."""

    peer: Peer
    reason: LostReason
    detail: str


class Received(msgspec.Struct, frozen=True):
    """A message other than Hello, Heartbeat and Goodbye, in the order it was sent."""

    peer: Peer
    message: ControlMessage


ChannelEvent: TypeAlias = PeerUp | PeerDown | Received
ChannelHandler: TypeAlias = Callable[[ChannelEvent], None]
