"""When jumps over forced tokens pay, and who takes part in them."""

from typing import Any

import pytest

from engine.jump_ahead import JumpAhead
from engine.sampler.sampled import SampledToken
from engine.scheduler.jump_rule import jumps_pay


class ForcingEngine:
    """What `JumpAhead` asks of an engine: these tokens are forced behind each sequence's own."""

    def __init__(self, forced: dict[Any, list[int]], *, jumps_ahead: bool = True) -> None:
        self.forced = forced
        self.jumps_ahead = jumps_ahead
        self.max_captured_chunks = 1
        self.appended: dict[Any, list[int]] = {}

    def forced_tokens(self, sequences: list[Any]) -> dict[Any, list[int]]:
        return {each: self.forced[each] for each in sequences if each in self.forced}

    def append(self, sequence: Any, token_ids: list[int]) -> None:
        self.appended[sequence] = token_ids


def extend(engine: Any, **state: Any) -> list[list[int]]:
    """What becomes of token 7 of three sequences."""
    sampled = [SampledToken(name, 7, None) for name in "abc"]  # pyright: ignore[reportArgumentType]
    state = {"num_running": 3, "is_ahead": False, "loses_graph": False} | state
    return [token.token_ids for token in JumpAhead(engine).extend(sampled, **state)]


@pytest.mark.parametrize(
    ("nums_spared", "num_running", "loses_graph", "pays"),
    [
        ([], 1, False, False),
        ([1], 1, False, True),
        ([1], 256, False, True),
        # Captured, a step with chunks costs everybody a fifth of a step.
        ([1], 4, True, True),
        ([1], 5, True, False),
        ([4, 4], 39, True, True),
        ([4, 4], 40, True, False),
        # Kernel by kernel, two.
        ([1, 1, 1], 1, True, True),
        ([20, 20, 20], 32, True, False),
        ([20, 20, 25], 32, True, True),
    ],
)
def test_a_step_with_chunks_costs_everybody_in_it(
    nums_spared: list[int], num_running: int, *, loses_graph: bool, pays: bool
) -> None:
    found = jumps_pay(nums_spared, num_running=num_running, loses_graph=loses_graph, max_captured=2)
    assert found == pays


def test_forced_tokens_come_behind_the_sampled_one() -> None:
    engine = ForcingEngine({"a": [1, 2], "c": [3]})
    assert extend(engine) == [[7, 1, 2], [7], [7, 3]]
    assert engine.appended == {"a": [1, 2], "c": [3]}


def test_with_a_step_ahead_one_token_is_no_gain() -> None:
    engine = ForcingEngine({"a": [1, 2], "c": [3]})
    assert extend(engine, is_ahead=True) == [[7, 1, 2], [7], [7]]
    assert engine.appended == {"a": [1, 2]}


def test_alone_it_costs_little_and_together_they_may_be_worth_a_graph() -> None:
    alone = ForcingEngine({"a": [1, 2]})
    assert extend(alone, loses_graph=True) == [[7, 1, 2], [7], [7]]
    assert extend(alone, loses_graph=True, num_running=10) == [[7], [7], [7]]
    few = ForcingEngine({"a": [1, 2, 3], "b": [4, 5, 6]})
    assert extend(few, loses_graph=True) == [[7], [7], [7]]
    assert not few.appended
    more = ForcingEngine({"a": [1, 2, 3], "b": [4, 5, 6, 8]})
    assert extend(more, loses_graph=True) == [[7, 1, 2, 3], [7, 4, 5, 6, 8], [7]]


def test_switched_off() -> None:
    engine = ForcingEngine({"a": [1, 2]}, jumps_ahead=False)
    assert extend(engine) == [[7], [7], [7]]
    assert not engine.appended
