"""The states of an incoming transfer: what may follow what."""

import itertools

import pytest

from services.decode.incoming import Event, IllegalTransitionError, Phase, advance

LEGAL = {
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


@pytest.mark.parametrize(("phase", "event"), list(itertools.product(Phase, Event)))
def test_every_pair_is_legal_as_documented_or_raises(phase: Phase, event: Event) -> None:
    following = LEGAL.get((phase, event))
    if following is None:
        with pytest.raises(IllegalTransitionError, match=f"{event.name} in phase {phase.name}"):
            advance(phase, event)
    else:
        assert advance(phase, event) is following


def test_blocks_that_may_be_written_to_leave_only_through_stopping_or_completion() -> None:
    leaving = {event for (phase, event) in LEGAL if phase is Phase.RECEIVING}
    assert leaving == {Event.ALL_RECEIVED, Event.GIVEN_UP}
    assert LEGAL[Phase.RECEIVING, Event.GIVEN_UP] is Phase.STOPPING


@pytest.mark.parametrize("start", [Phase.ANNOUNCED, Phase.EXPECTED])
def test_every_transfer_can_end(start: Phase) -> None:
    reachable, frontier = {start}, [start]
    while frontier:
        phase = frontier.pop()
        for (source, _), target in LEGAL.items():
            if source is phase and target not in reachable:
                reachable.add(target)
                frontier.append(target)
    assert Phase.GONE in reachable
