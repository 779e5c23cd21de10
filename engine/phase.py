"""Where a sequence stands on a worker, and every step it may take from there.

    new -> waiting -> prefilling -> decoding -> finished         local prefill and decode
               ^          |  |         |
               +-preempt--+--|---------+
                          |  +-> retained -> finished            prefill worker: KV being sent
            swapped <-swap+------------+                         preempted, KV in host memory
               +-> prefilling                                    and goes on where it was
    new -> reserved -> arrived -> decoding                       decode worker: KV being received
               +-> stopping -> finished                          cancelled while being received

`release` frees a sequence's blocks exactly where a transition leaves a phase that holds some.
"""

from enum import Enum, auto


class Phase(Enum):
    """`waiting` and `finished` hold no blocks, `swapped` blocks of host memory only; `stopping` has
    its blocks in quarantine."""

    NEW = auto()
    WAITING = auto()
    SWAPPED = auto()
    PREFILLING = auto()
    DECODING = auto()
    RETAINED = auto()
    RESERVED = auto()
    ARRIVED = auto()
    STOPPING = auto()
    FINISHED = auto()


class PhaseEvent(Enum):
    """What happens to a sequence."""

    ADD = auto()
    START = auto()
    CATCH_UP = auto()
    PREEMPT = auto()
    SWAP = auto()
    RETAIN = auto()
    RELEASE = auto()
    RESERVE = auto()
    ARRIVE = auto()
    JOIN = auto()
    CANCEL = auto()
    STOP = auto()
    FINISH = auto()
    ABORT = auto()


class PhaseError(RuntimeError):
    """An event came to a sequence in a phase where it can't: a bug of ours."""


_TRANSITIONS: dict[tuple[Phase, PhaseEvent], Phase] = {
    (Phase.NEW, PhaseEvent.ADD): Phase.WAITING,
    (Phase.WAITING, PhaseEvent.START): Phase.PREFILLING,
    (Phase.SWAPPED, PhaseEvent.START): Phase.PREFILLING,
    (Phase.PREFILLING, PhaseEvent.CATCH_UP): Phase.DECODING,
    (Phase.PREFILLING, PhaseEvent.RETAIN): Phase.RETAINED,
    (Phase.DECODING, PhaseEvent.FINISH): Phase.FINISHED,
    (Phase.RETAINED, PhaseEvent.RELEASE): Phase.FINISHED,
    (Phase.NEW, PhaseEvent.RESERVE): Phase.RESERVED,
    (Phase.RESERVED, PhaseEvent.ARRIVE): Phase.ARRIVED,
    (Phase.ARRIVED, PhaseEvent.JOIN): Phase.DECODING,
    (Phase.RESERVED, PhaseEvent.CANCEL): Phase.STOPPING,
    (Phase.STOPPING, PhaseEvent.STOP): Phase.FINISHED,
    (Phase.PREFILLING, PhaseEvent.PREEMPT): Phase.WAITING,
    (Phase.DECODING, PhaseEvent.PREEMPT): Phase.WAITING,
    (Phase.ARRIVED, PhaseEvent.PREEMPT): Phase.WAITING,
    (Phase.PREFILLING, PhaseEvent.SWAP): Phase.SWAPPED,
    (Phase.DECODING, PhaseEvent.SWAP): Phase.SWAPPED,
    (Phase.ARRIVED, PhaseEvent.SWAP): Phase.SWAPPED,
    (Phase.WAITING, PhaseEvent.ABORT): Phase.FINISHED,
    (Phase.SWAPPED, PhaseEvent.ABORT): Phase.FINISHED,
    (Phase.PREFILLING, PhaseEvent.ABORT): Phase.FINISHED,
    (Phase.DECODING, PhaseEvent.ABORT): Phase.FINISHED,
    (Phase.RETAINED, PhaseEvent.ABORT): Phase.FINISHED,
    (Phase.ARRIVED, PhaseEvent.ABORT): Phase.FINISHED,
}


def advance(phase: Phase, event: PhaseEvent) -> Phase:
    """The phase after `event`; raises PhaseError if it can't happen in `phase`."""
    following = _TRANSITIONS.get((phase, event))
    if following is None:
        raise PhaseError(f"{event.name.lower()} can't happen to a {phase.name.lower()} sequence")
    return following
