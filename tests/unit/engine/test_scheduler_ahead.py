"""When the decode scheduler plans a step ahead, and when it had better wait."""

from decode_scheduling import commit, make_scheduler, make_sequence, scheduled, step


def test_it_goes_ahead_while_nobody_waits() -> None:
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


def test_a_prompt_that_let_a_transfer_go_first_is_asked_again() -> None:
    scheduler, _ = make_scheduler(num_blocks=9)
    scheduler.add(make_sequence("a", [1] * 15))
    step(scheduler)
    assert scheduler.try_reserve(make_sequence("transfer", [1] * 20, arrival_s=1.0)) is None
    scheduler.add(make_sequence("b", [1] * 5, arrival_s=2.0))
    running = scheduler.schedule()
    assert scheduled(running) == {"a": 1}
    assert scheduler.schedule_ahead(running) is None
    commit(scheduler, running)
    # The transfer wants nothing any more.
    assert scheduled(scheduler.schedule()) == {"a": 1, "b": 5}


def test_a_new_prompt_is_let_in_before_a_further_step_ahead() -> None:
    scheduler, _ = make_scheduler()
    scheduler.add(make_sequence("a", [1] * 5))
    step(scheduler)
    running = scheduler.schedule()
    scheduler.add(make_sequence("b", [1] * 5))
    assert scheduler.schedule_ahead(running) is None
    commit(scheduler, running)
    assert scheduled(scheduler.schedule()) == {"a": 1, "b": 5}


def test_a_prompt_without_blocks_stops_nothing_until_some_come_back() -> None:
    scheduler, _ = make_scheduler(num_blocks=9)
    scheduler.add(make_sequence("a", [1] * 15, max_tokens=2))
    scheduler.add(make_sequence("b", [1] * 5))
    step(scheduler)
    scheduler.add(make_sequence("long", [1] * 20))
    running = scheduler.schedule()
    assert scheduled(running) == {"a": 1, "b": 1}
    ahead = scheduler.schedule_ahead(running)
    assert ahead is not None
    assert scheduled(ahead) == {"b": 1}
    commit(scheduler, running)  # the end of "a"
    assert scheduler.schedule_ahead(ahead) is None
    commit(scheduler, ahead)
    assert scheduled(scheduler.schedule()) == {"b": 1, "long": 20}


def test_who_was_preempted_may_come_back_in_the_next_step() -> None:
    scheduler, _ = make_scheduler(num_blocks=6)
    scheduler.add(make_sequence("a", [1] * 8, arrival_s=0.0))
    scheduler.add(make_sequence("b", [1] * 12, arrival_s=1.0))
    while not (running := scheduler.schedule()).preempted:
        commit(scheduler, running)
    assert scheduler.schedule_ahead(running) is None
