"""A request whose KV a prefill worker is going to send: its states, in one table."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum, auto

from protocol.ids import Incarnation, RequestKey, WorkerId
from protocol.messages import PrefillDone
from protocol.request import Request
from protocol.ticket import TransferTicket
from services.runtime.peers import Peer


class Phase(Enum):
    ANNOUNCED = auto()  # prefill asked for room before the router's request came
    EXPECTED = auto()  # the router's request is here, prefill has not started on it
    WAITING = auto()  # both are here; the engine has no room yet
    RECEIVING = auto()  # blocks are reserved and the ticket is out
    STOPPING = auto()  # given up; blocks are held back until no write can reach them
    GONE = auto()  # admitted or freed; the entry leaves the table


class Event(Enum):
    REQUEST_CAME = auto()
    ROOM_ASKED = auto()
    ROOM_GIVEN = auto()
    ALL_RECEIVED = auto()
    GIVEN_UP = auto()
    WRITES_STOPPED = auto()


_TRANSITIONS: Mapping[tuple[Phase, Event], Phase] = {
    (Phase.ANNOUNCED, Event.REQUEST_CAME): Phase.WAITING,
    (Phase.ANNOUNCED, Event.GIVEN_UP): Phase.GONE,
    (Phase.EXPECTED, Event.ROOM_ASKED): Phase.WAITING,
    (Phase.EXPECTED, Event.GIVEN_UP): Phase.GONE,
    (Phase.WAITING, Event.ROOM_GIVEN): Phase.RECEIVING,
    (Phase.WAITING, Event.GIVEN_UP): Phase.GONE,
    (Phase.RECEIVING, Event.ALL_RECEIVED): Phase.GONE,
    (Phase.RECEIVING, Event.GIVEN_UP): Phase.STOPPING,
    (Phase.STOPPING, Event.WRITES_STOPPED): Phase.GONE,
}


class IllegalTransitionError(RuntimeError):
    """A bug of ours: an event that can't happen in this phase."""


def advance(phase: Phase, event: Event) -> Phase:
    """The phase that follows; raises IllegalTransitionError for a pair not in the table."""
    try:
        return _TRANSITIONS[phase, event]
    except KeyError:
        raise IllegalTransitionError(f"{event.name} in phase {phase.name}") from None


@dataclass(slots=True)
class Incoming:
    """What decode knows of one expected request.

    `worker_id` and `incarnation` are the prefill worker's, `sender` its connection once it has
    spoken; `deadline_s` is on this process's monotonic clock, None while no lease runs.
    """

    key: RequestKey
    worker_id: WorkerId
    incarnation: Incarnation
    phase: Phase
    request: Request | None = None
    sender: Peer | None = None
    deadline_s: float | None = None
    ticket: TransferTicket | None = None
    num_writes_received: int = 0
    done: PrefillDone | None = None
    sender_stopped: bool = False
    receives_stopped: bool = False

    def advance(self, event: Event) -> None:
        self.phase = advance(self.phase, event)
