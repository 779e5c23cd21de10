"""How sequences that know several of their tokens share steps and blocks."""

from decode_scheduling import commit, make_scheduler, make_sequence, scheduled, step

from engine.scheduler.decode import DecodeScheduler
from engine.scheduler.plan import StepPlan
from engine.scheduler.running import DecodeTokens


def jump(scheduler: DecodeScheduler, plan: StepPlan, **nums_forced: int) -> None:
    """Commits `plan`; so many tokens are forced behind what the named sequences sampled."""
    sampling = [item.sequence.key.request_id for item in plan.scheduled if item.samples]
    scheduler.commit(plan, [[9] + [8] * nums_forced.get(name, 0) for name in sampling])


def test_known_tokens_are_one_chunk_and_all_of_them_count() -> None:
    scheduler, pool = make_scheduler()
    sequence = make_sequence("a", [1] * 5, max_tokens=12)
    scheduler.add(sequence)
    jump(scheduler, scheduler.schedule(), a=7)
    assert sequence.num_output_tokens == 8
    plan = scheduler.schedule()
    assert scheduled(plan) == {"a": 8}
    assert plan.scheduled[0].samples
    assert len(sequence.block_ids) == pool.num_blocks_for(13)
    [update] = scheduler.commit(plan, [[9, 8, 8, 8, 8, 8]])
    assert update.new_token_ids == [9, 8, 8, 8]
    assert update.finish_reason == "length"
    assert pool.counts.referenced == 0


def test_a_stop_token_among_them_ends_it() -> None:
    scheduler, _ = make_scheduler()
    sequence = make_sequence("a", [1] * 5, stop_token_ids=(8,))
    scheduler.add(sequence)
    [update] = scheduler.commit(scheduler.schedule(), [[9, 9, 8, 9]])
    assert (update.new_token_ids, update.finish_reason, update.stop_token_id) == (
        [9, 9, 8],
        "stop",
        8,
    )


def test_everybody_gets_a_token_before_anybody_gets_more() -> None:
    scheduler, _ = make_scheduler(budget=12)
    for i, name in enumerate("abc"):
        scheduler.add(make_sequence(name, [1] * 4, arrival_s=float(i)))
    jump(scheduler, scheduler.schedule(), a=7, b=7)
    plan = scheduler.schedule()
    assert scheduled(plan) == {"a": 8, "b": 3, "c": 1}
    assert [item.samples for item in plan.scheduled] == [True, True, False]
    assert plan.scheduled[0].sequence.key.request_id == "c", "rows of one token come first"
    commit(scheduler, plan)
    assert scheduled(scheduler.schedule()) == {"a": 1, "b": 5, "c": 1}


def test_known_tokens_take_their_room_from_prompts() -> None:
    scheduler, _ = make_scheduler(budget=64, mixed_budget=10)
    scheduler.add(make_sequence("a", [1] * 4))
    jump(scheduler, scheduler.schedule(), a=6)
    scheduler.add(make_sequence("b", [1] * 40))
    assert step(scheduler) == {"a": 7, "b": 4}
    assert step(scheduler) == {"a": 1, "b": 8}


def test_who_jumped_does_not_sample_in_the_step_that_runs_already() -> None:
    scheduler, _ = make_scheduler()
    for name in "ab":
        scheduler.add(make_sequence(name, [1] * 4))
    step(scheduler)
    running = scheduler.schedule()
    ahead = scheduler.schedule_ahead(running)
    assert ahead is not None
    jump(scheduler, running, a=3)
    assert scheduled(ahead) == {"a": 1, "b": 1}
    assert [item.samples for item in ahead.scheduled] == [False, True]
    behind = scheduler.schedule_ahead(ahead)
    assert behind is not None
    assert scheduled(behind) == {"a": 3, "b": 1}
    # Of "a" all is known; the token of "b" is the only one that `ahead` samples.
    assert [item.source for item in behind.scheduled] == [0, None]
    assert [item.start for item in behind.scheduled] == [6, 6]
    commit(scheduler, ahead)
    assert scheduler.schedule_ahead(behind) is not None


def test_blocks_for_a_jump_come_from_whoever_ranks_last() -> None:
    scheduler, pool = make_scheduler(num_blocks=6)
    first, last = (make_sequence(name, [1] * 8, arrival_s=i) for i, name in enumerate("ab"))
    for sequence in (first, last):
        scheduler.add(sequence)
    jump(scheduler, scheduler.schedule(), a=12, b=1)
    plan = scheduler.schedule()
    assert scheduled(plan) == {"a": 13}
    assert plan.preempted == [last]
    assert pool.counts.free == 0
    assert last.token_ids[-2:] == [9, 8], "what is known stays known"


def test_more_sequences_than_tokens_in_a_step_get_one_each() -> None:
    """They arrive by transfer, which no step's budget holds back."""
    tokens = DecodeTokens(4, 6)
    assert [tokens.give(num_known) for num_known in (5, 1, 2)] == [1, 1, 1]
