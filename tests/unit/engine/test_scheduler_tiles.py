"""Prompt tokens that a step had better leave to the next: the rule of engine/scheduler/tiles.py."""

import pytest
from decode_scheduling import commit, make_scheduler, make_sequence, scheduled, step

from engine.scheduler.tiles import StepTiles

TILES = StepTiles(16, (0, 2, 8))


@pytest.mark.parametrize(
    ("num_decodes", "num_prompt_tokens", "expected"),
    [
        (8, 24, 24),  # whole tiles
        (8, 28, 24),
        (8, 29, 29),  # more than a quarter of a tile is worth beginning it
        (5, 28, 24),  # 5 are padded to 8
        (2, 33, 30),
        (9, 25, 23),  # more than the last padding: as they are
        (8, 12, 12),  # less than two tiles
        (8, 0, 0),
    ],
)
def test_worthwhile(num_decodes: int, num_prompt_tokens: int, expected: int) -> None:
    assert TILES.worthwhile(num_decodes, num_prompt_tokens) == expected


def test_what_hardly_fills_a_tile_waits_for_the_next_step() -> None:
    scheduler, _ = make_scheduler(tiles=TILES)
    scheduler.add(make_sequence("a", [1] * 3))
    step(scheduler)
    scheduler.add(make_sequence("prompt", [2] * 33, arrival_s=1.0))
    # 2 and 30 would fill two tiles; the chunk ends with a block of 4.
    assert step(scheduler) == {"a": 1, "prompt": 28}
    assert step(scheduler) == {"a": 1, "prompt": 5}
    assert step(scheduler) == {"a": 1, "prompt": 1}


def test_of_several_prompts_the_last_one_waits_for_its_rest() -> None:
    scheduler, _ = make_scheduler(tiles=TILES)
    scheduler.add(make_sequence("a", [1] * 3))
    step(scheduler)
    scheduler.add(make_sequence("first", [2] * 17, arrival_s=1.0))
    scheduler.add(make_sequence("second", [3] * 16, arrival_s=2.0))
    assert step(scheduler) == {"a": 1, "first": 17, "second": 12}
    assert step(scheduler) == {"a": 1, "first": 1, "second": 4}


def test_a_prompt_that_would_get_nothing_is_not_cut() -> None:
    scheduler, _ = make_scheduler(tiles=TILES)
    scheduler.add(make_sequence("a", [1] * 3))
    step(scheduler)
    scheduler.add(make_sequence("first", [2] * 31, arrival_s=1.0))
    scheduler.add(make_sequence("second", [3] * 2, arrival_s=2.0))
    assert step(scheduler) == {"a": 1, "first": 31, "second": 2}


def test_prompts_alone_are_not_cut() -> None:
    scheduler, _ = make_scheduler(tiles=TILES)
    scheduler.add(make_sequence("a", [1] * 33))
    assert step(scheduler) == {"a": 33}


def test_a_step_ahead_follows_the_rule_behind_tokens_in_flight() -> None:
    scheduler, _ = make_scheduler(tiles=TILES)
    scheduler.add(make_sequence("a", [1] * 3))
    step(scheduler)
    scheduler.add(make_sequence("prompt", [2] * 33, arrival_s=1.0))
    running = scheduler.schedule()
    ahead = scheduler.schedule_ahead(running)
    assert ahead is not None
    assert scheduled(ahead) == {"a": 1, "prompt": 5}
    commit(scheduler, running)
    commit(scheduler, ahead)
    assert step(scheduler) == {"a": 1, "prompt": 1}
