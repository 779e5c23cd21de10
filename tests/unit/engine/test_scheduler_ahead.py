"""What the decode and prefill schedulers plan a step ahead, and when they had better wait."""

from decode_scheduling import (
    BLOCK_SIZE,
    commit,
    make_scheduler,
    make_sequence,
    names,
    scheduled,
    step,
)

from engine.block_pool import BlockPool
from engine.scheduler.config import SchedulerConfig
from engine.scheduler.decode import DecodeScheduler
from engine.scheduler.plan import StepPlan
from engine.scheduler.prefill import PrefillScheduler


def make_prefill_scheduler(*, budget: int) -> tuple[PrefillScheduler, BlockPool]:
    pool = BlockPool(20, BLOCK_SIZE, enable_prefix_caching=False)
    config = SchedulerConfig(max_num_seqs=8, max_num_batched_tokens=budget, max_model_len=1000)
    return PrefillScheduler(pool, config), pool


def ahead_of(scheduler: DecodeScheduler | PrefillScheduler, running: StepPlan) -> StepPlan:
    ahead = scheduler.schedule_ahead(running)
    assert ahead is not None
    return ahead


def starts(plan: StepPlan) -> list[int]:
    return [item.start for item in plan.scheduled]


def test_a_token_under_way_is_the_next_input() -> None:
    scheduler, _ = make_scheduler()
    scheduler.add(make_sequence("a", [1] * 5, max_tokens=3))
    step(scheduler)
    running = scheduler.schedule()
    ahead = scheduler.schedule_ahead(running)
    assert ahead is not None
    assert scheduled(ahead) == {"a": 1}
    assert ahead.scheduled[0].source == 0
    commit(scheduler, running)
    # The token under way is the last one.
    assert scheduler.schedule_ahead(ahead) is None
    assert commit(scheduler, ahead)[0].finish_reason == "length"


def test_a_prompt_goes_on_behind_its_chunk_under_way_and_then_decodes() -> None:
    scheduler, _ = make_scheduler(budget=8)
    sequence = make_sequence("a", [1] * 19)
    scheduler.add(sequence)
    first = scheduler.schedule()
    second = ahead_of(scheduler, first)
    assert (scheduled(second), starts(second)) == ({"a": 8}, [8])
    commit(scheduler, first)
    third = ahead_of(scheduler, second)
    assert (scheduled(third), starts(third)) == ({"a": 3}, [16])
    assert [item.samples for item in third.scheduled] == [True]
    commit(scheduler, second)
    fourth = ahead_of(scheduler, third)
    assert (scheduled(fourth), starts(fourth)) == ({"a": 1}, [19])
    assert fourth.scheduled[0].source == 0
    commit(scheduler, third)
    assert sequence.num_tokens == 20
    commit(scheduler, fourth)
    assert sequence.num_computed_tokens == 20


def test_a_prompt_of_one_output_token_is_not_followed() -> None:
    scheduler, _ = make_scheduler()
    scheduler.add(make_sequence("a", [1] * 5, max_tokens=1))
    assert scheduler.schedule_ahead(scheduler.schedule()) is None


def test_a_new_prompt_comes_in_ahead() -> None:
    scheduler, _ = make_scheduler()
    scheduler.add(make_sequence("a", [1] * 5))
    step(scheduler)
    running = scheduler.schedule()
    scheduler.add(make_sequence("b", [1] * 5))
    assert scheduled(ahead_of(scheduler, running)) == {"a": 1, "b": 5}


def test_short_prompts_pass_what_a_long_one_has_left_behind_its_chunk_under_way() -> None:
    scheduler, _ = make_scheduler(budget=16)
    scheduler.add(make_sequence("long", [1] * 40))
    first = scheduler.schedule()
    assert scheduled(first) == {"long": 16}
    scheduler.add(make_sequence("short", [2] * 8, arrival_s=1.0))
    second = ahead_of(scheduler, first)
    assert scheduled(second) == {"short": 8, "long": 8}
    commit(scheduler, first)
    commit(scheduler, second)


def test_a_refused_transfer_goes_before_prompts_behind_it_until_a_commit() -> None:
    scheduler, _ = make_scheduler(num_blocks=9)
    scheduler.add(make_sequence("a", [1] * 15))
    step(scheduler)
    assert scheduler.try_reserve(make_sequence("transfer", [1] * 20, arrival_s=1.0)) is None
    scheduler.add(make_sequence("b", [1] * 5, arrival_s=2.0))
    running = scheduler.schedule()
    assert scheduled(running) == {"a": 1}
    ahead = ahead_of(scheduler, running)
    assert scheduled(ahead) == {"a": 1}
    commit(scheduler, running)
    # The transfer wants nothing any more.
    assert scheduled(ahead_of(scheduler, ahead)) == {"a": 1, "b": 5}


def test_a_prompt_without_blocks_comes_in_when_the_step_that_still_writes_to_them_is_through() -> (
    None
):
    scheduler, _ = make_scheduler(num_blocks=9)
    scheduler.add(make_sequence("a", [1] * 15, stop_token_ids=(9,)))
    scheduler.add(make_sequence("b", [1] * 5))
    commit(scheduler, scheduler.schedule(), token_id=8)
    scheduler.add(make_sequence("long", [1] * 20))
    running = scheduler.schedule()
    ahead = ahead_of(scheduler, running)
    assert scheduled(ahead) == {"a": 1, "b": 1}
    commit(scheduler, running)  # the end of "a"
    behind = ahead_of(scheduler, ahead)
    assert scheduled(behind) == {"b": 1}
    commit(scheduler, ahead)
    assert scheduled(ahead_of(scheduler, behind)) == {"b": 1, "long": 20}


def test_nobody_is_preempted_ahead() -> None:
    scheduler, _ = make_scheduler(num_blocks=6)
    scheduler.add(make_sequence("a", [1] * 8, arrival_s=0.0))
    scheduler.add(make_sequence("b", [1] * 12, arrival_s=1.0))
    running = scheduler.schedule()
    while (ahead := scheduler.schedule_ahead(running)) is not None:
        commit(scheduler, running)
        running = ahead
    commit(scheduler, running)
    assert scheduler.stats.num_preemptions == 0
    assert names(scheduler.schedule().preempted) == ["b"]


def test_a_prefill_worker_goes_on_behind_the_chunks_under_way() -> None:
    scheduler, _ = make_prefill_scheduler(budget=8)
    for name, length in (("a", 11), ("b", 9)):
        scheduler.add(make_sequence(name, [1] * length))
    first = scheduler.schedule()
    assert scheduled(first) == {"a": 8}
    second = ahead_of(scheduler, first)
    assert (scheduled(second), starts(second)) == ({"a": 3, "b": 4}, [8, 0])
    assert commit(scheduler, first) == []
    third = ahead_of(scheduler, second)
    assert (scheduled(third), starts(third)) == ({"b": 5}, [4])
    assert names([update.sequence for update in commit(scheduler, second)]) == ["a"]
    assert scheduler.schedule_ahead(third) is None
    assert names([update.sequence for update in commit(scheduler, third)]) == ["b"]
    assert scheduler.num_retained == 2


def test_an_aborted_prompt_keeps_the_blocks_that_the_step_ahead_writes_to() -> None:
    scheduler, pool = make_prefill_scheduler(budget=8)
    sequence = make_sequence("a", [1] * 20)
    scheduler.add(sequence)
    first = scheduler.schedule()
    second = ahead_of(scheduler, first)
    commit(scheduler, first)
    assert scheduler.abort(sequence.key) is sequence
    assert pool.counts.free == 15
    assert scheduler.schedule_ahead(second) is None
    assert commit(scheduler, second) == []
    assert pool.counts.free == 20
