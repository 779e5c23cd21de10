"""Coalescing of block lists into messages."""

from hypothesis import given
from hypothesis import strategies as st

from kvtransfer.plan import (
    MAX_PER_PART,
    MAX_RUNS_PER_MESSAGE,
    MAX_RUNS_PER_PART,
    MessageLimits,
    PlannedMessage,
    plan_messages,
    split_into_parts,
)
from kvtransfer.region import Run

LIMITS = MessageLimits(direct=8, gather_below=3, gathered=4)


def expanded(runs: tuple[Run, ...]) -> list[int]:
    return [block for first, count in runs for block in range(first, first + count)]


@st.composite
def transfers(draw: st.DrawFn) -> tuple[list[int], list[int]]:
    """Block lists with runs of all lengths, not aligned between the sides."""
    size = draw(st.integers(0, 60))

    def side() -> list[int]:
        starts = draw(st.lists(st.integers(0, 1000), min_size=size, max_size=size, unique=True))
        blocks: list[int] = []
        while len(blocks) < size:
            first = starts[len(blocks)]
            length = draw(st.integers(1, 12))
            blocks += [b for b in range(first, first + length) if b not in blocks]
        return blocks[:size]

    return side(), side()


@given(transfers(), st.integers(1, 9), st.integers(1, 9), st.integers(1, 9))
def test_every_block_goes_to_its_place_once(
    transfer: tuple[list[int], list[int]], direct: int, gather_below: int, gathered: int
):
    src, dst = transfer
    limits = MessageLimits(direct=direct, gather_below=gather_below, gathered=gathered)
    moved: dict[int, int] = {}
    for message in plan_messages(src, dst, limits):
        sources, places = expanded(message.src_runs), expanded(message.dst_runs)
        assert len(sources) == len(places) == message.num_blocks
        assert message.num_blocks <= max(direct, gathered, gather_below - 1)
        moved.update(zip(places, sources, strict=True))
    assert moved == dict(zip(dst, src, strict=True))


def test_a_long_run_is_cut_and_not_gathered():
    assert plan_messages(list(range(20)), list(range(100, 120)), LIMITS) == [
        PlannedMessage(((0, 8),), ((100, 8),)),
        PlannedMessage(((8, 8),), ((108, 8),)),
        PlannedMessage(((16, 4),), ((116, 4),)),
    ]


def test_short_runs_travel_together():
    assert plan_messages([1, 5, 9, 20, 21, 40], [7, 3, 80, 50, 51, 60], LIMITS) == [
        PlannedMessage(((1, 1), (5, 1), (9, 1)), ((7, 1), (3, 1), (80, 1))),
        PlannedMessage(((20, 2), (40, 1)), ((50, 2), (60, 1))),
    ]


def test_a_side_that_is_contiguous_stays_one_run():
    [message] = plan_messages([1, 5, 9], [10, 11, 12], LIMITS)
    assert message.dst_runs == ((10, 3),)
    [message] = plan_messages([10, 11, 12], [1, 5, 9], LIMITS)
    assert message.src_runs == ((10, 3),)


def test_parts_are_small_enough_for_a_header():
    limits = MessageLimits(direct=1, gather_below=2, gathered=1000)
    blocks = list(range(0, 4000, 2))
    messages = plan_messages(blocks, blocks, limits)
    assert max(len(m.dst_runs) for m in messages) == MAX_RUNS_PER_MESSAGE
    parts = split_into_parts(messages)
    assert [m for part in parts for m in part] == messages
    for part in parts:
        assert sum(len(m.dst_runs) for m in part) <= MAX_RUNS_PER_PART
        assert len(part) <= MAX_PER_PART


def test_an_empty_write_has_one_empty_part():
    assert split_into_parts(plan_messages([], [], LIMITS)) == [[]]
