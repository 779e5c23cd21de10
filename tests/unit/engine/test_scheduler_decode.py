"""Decode's batch: joining, growth, preemption, budgets."""

import pytest
from decode_scheduling import (
    commit,
    make_scheduler,
    make_sequence,
    names,
    reserve,
    scheduled,
    step,
)

from engine.block_pool import BlockCounts
from engine.phase import Phase
from engine.scheduler.plan import StepPlan
from protocol.errors import ContextLengthError, InvalidRequestError
from protocol.ids import RequestKey


def test_running_sequences_come_before_prompt_chunks() -> None:
    scheduler, _ = make_scheduler(budget=10)
    scheduler.add(make_sequence("a", [1] * 6))
    assert step(scheduler) == {"a": 6}
    scheduler.add(make_sequence("b", [2] * 16, arrival_s=-1.0))
    assert step(scheduler) == {"a": 1, "b": 8}
    assert step(scheduler) == {"a": 1, "b": 8}
    assert step(scheduler) == {"b": 1, "a": 1}


def test_prompt_chunks_are_smaller_beside_running_sequences() -> None:
    scheduler, _ = make_scheduler(budget=8, mixed_budget=4)
    scheduler.add(make_sequence("a", [1] * 12))
    assert step(scheduler) == {"a": 8}
    assert step(scheduler) == {"a": 4}
    scheduler.add(make_sequence("b", [2] * 6))
    assert step(scheduler) == {"a": 1, "b": 4}
    assert step(scheduler) == {"a": 1, "b": 2}
    assert step(scheduler) == {"a": 1, "b": 1}


def test_a_sequence_grows_by_a_block_when_its_last_is_full() -> None:
    scheduler, pool = make_scheduler()
    sequence = make_sequence("a", [1] * 3)
    scheduler.add(sequence)
    held = []
    for _ in range(6):
        step(scheduler)
        held.append(len(sequence.block_ids))
    assert held == [1, 1, 2, 2, 2, 2]
    assert pool.counts.referenced == 2


def test_finished_sequences_return_their_blocks() -> None:
    scheduler, pool = make_scheduler()
    scheduler.add(make_sequence("a", [1] * 3, max_tokens=2))
    step(scheduler)
    (update,) = commit(scheduler, scheduler.schedule())
    assert update.finish_reason == "length"
    assert update.sequence.phase is Phase.FINISHED
    assert pool.counts.free == 100
    assert scheduler.num_running == 0
    assert scheduler.abort(update.sequence.key) is None


def test_a_finished_sequences_blocks_can_be_hit() -> None:
    scheduler, pool = make_scheduler(enable_prefix_caching=True)
    scheduler.add(make_sequence("a", [1, 2, 3, 4, 5], max_tokens=4))
    for _ in range(4):
        step(scheduler)
    # 5 + 4 tokens, but the last one's KV was never computed: two full blocks.
    assert pool.counts == BlockCounts(free=98, referenced=0, cached=2, quarantined=0, total=100)
    following = make_sequence("b", [1, 2, 3, 4, 5, 9, 9, 9, 9, 7])
    scheduler.add(following)
    assert step(scheduler) == {"b": 2}
    assert following.num_cached_tokens == 8


def test_the_last_in_rank_is_preempted_and_continues_with_all_its_tokens() -> None:
    scheduler, pool = make_scheduler(num_blocks=5)
    early, late = make_sequence("early", [1] * 7), make_sequence("late", [2] * 7, arrival_s=1.0)
    scheduler.add(late)
    scheduler.add(early)
    step(scheduler)
    step(scheduler)
    plan = scheduler.schedule()
    assert scheduled(plan) == {"early": 1}
    assert names(plan.preempted) == ["late"]
    commit(scheduler, plan)
    assert late.phase is Phase.WAITING
    assert late.block_ids == []
    assert (late.num_tokens, late.num_computed_tokens, late.num_preemptions) == (9, 0, 1)
    assert scheduler.stats.num_preemptions == 1
    scheduler.abort(early.key)
    assert step(scheduler) == {"late": 9}
    assert late.num_output_tokens == 3
    assert pool.counts.referenced == 3


def test_lower_priority_is_preempted_before_later_arrival() -> None:
    scheduler, _ = make_scheduler(num_blocks=5)
    scheduler.add(make_sequence("urgent", [1] * 7, arrival_s=1.0, priority=-1))
    scheduler.add(make_sequence("early", [2] * 7))
    step(scheduler)
    step(scheduler)
    assert names(scheduler.schedule().preempted) == ["early"]


def test_a_preempted_sequence_finds_its_blocks_in_the_cache() -> None:
    scheduler, _ = make_scheduler(num_blocks=9, enable_prefix_caching=True)
    scheduler.add(make_sequence("early", [1] * 11))
    late = make_sequence("late", [2] * 11, arrival_s=1.0)
    scheduler.add(late)
    blocker = make_sequence("blocker", [3] * 7, arrival_s=0.5)
    scheduler.add(blocker)
    step(scheduler)
    step(scheduler)
    plan = scheduler.schedule()
    assert names(plan.preempted) == ["late"]
    commit(scheduler, plan)
    scheduler.abort(blocker.key)
    # blocker's growth evicted the last of late's three full blocks.
    assert step(scheduler)["late"] == late.num_tokens - 1 - 8
    assert late.num_cached_tokens == 0, "what the client is told counts the first admission"


def test_a_preempted_sequence_waits_in_front() -> None:
    scheduler, _ = make_scheduler(num_blocks=5, max_num_seqs=3)
    scheduler.add(make_sequence("early", [1] * 7, max_tokens=4))
    scheduler.add(make_sequence("late", [2] * 7, arrival_s=1.0))
    step(scheduler)
    step(scheduler)
    scheduler.add(make_sequence("new", [3], arrival_s=0.5))
    plan = scheduler.schedule()
    assert names(plan.preempted) == ["late"]
    assert scheduled(plan) == {"early": 1}
    commit(scheduler, plan)
    assert step(scheduler) == {"early": 1}, "new would fit, but waits behind late"
    assert list(step(scheduler)) == ["late", "new"]


def test_nobody_is_admitted_in_a_step_that_preempts() -> None:
    scheduler, _ = make_scheduler(num_blocks=5)
    scheduler.add(make_sequence("early", [1] * 7))
    scheduler.add(make_sequence("late", [2] * 7, arrival_s=1.0))
    step(scheduler)
    step(scheduler)
    scheduler.add(make_sequence("urgent", [3], priority=-1))
    plan = scheduler.schedule()
    assert (scheduled(plan), names(plan.preempted)) == ({"early": 1}, ["late"])
    commit(scheduler, plan)
    assert list(step(scheduler)) == ["early", "urgent"]


def test_admission_leaves_the_watermark_to_running_sequences() -> None:
    scheduler, pool = make_scheduler(num_blocks=4)
    scheduler.add(make_sequence("a", [1] * 4))
    step(scheduler)
    scheduler.add(make_sequence("b", [2] * 12, arrival_s=1.0))
    assert step(scheduler) == {"a": 1}
    scheduler.abort(RequestKey("a", 0))
    assert step(scheduler) == {"b": 12}
    assert pool.counts.free == 1


def test_admission_leaves_room_for_what_running_sequences_grow_by() -> None:
    scheduler, pool = make_scheduler(num_blocks=160, budget=1000)
    scheduler.add(make_sequence("a", [1] * 32, max_tokens=30))
    step(scheduler)
    # 8 blocks of 160 are for "a", which may come to hold 62 tokens.
    scheduler.add(make_sequence("b", [2] * 4 * 146, max_tokens=2, arrival_s=1.0))
    assert step(scheduler) == {"a": 1}
    scheduler.abort(RequestKey("b", 0))
    scheduler.add(make_sequence("c", [2] * 4 * 144, max_tokens=2, arrival_s=1.0))
    assert step(scheduler) == {"a": 1, "c": 576}
    while scheduler.num_running:
        step(scheduler)
    assert scheduler.stats.num_preemptions == 0
    assert pool.counts.free == 160


def test_growth_keeps_no_more_than_a_share_of_the_pool() -> None:
    scheduler, _ = make_scheduler(num_blocks=160, budget=1000)
    scheduler.add(make_sequence("a", [1] * 32, max_tokens=500))
    step(scheduler)
    scheduler.add(make_sequence("b", [2] * 4 * 141, arrival_s=1.0))
    assert step(scheduler) == {"a": 1, "b": 564}


def test_a_sequence_alone_ends_where_the_pool_does() -> None:
    scheduler, _ = make_scheduler(num_blocks=3)
    scheduler.add(make_sequence("a", [1] * 9))
    step(scheduler)
    step(scheduler)
    (update,) = commit(scheduler, scheduler.schedule())
    assert update.finish_reason == "length"
    assert update.sequence.num_tokens == 12 == scheduler.max_model_len


def test_a_sequence_alone_pauses_while_blocks_are_in_quarantine() -> None:
    scheduler, _ = make_scheduler(num_blocks=3)
    reservation = reserve(scheduler, make_sequence("coming", [1] * 4))
    scheduler.add(make_sequence("a", [2] * 4))
    step(scheduler)
    step(scheduler)  # its second block is the pool's last
    scheduler.cancel_reservation(reservation)
    for _ in range(3):
        step(scheduler)
    plan = scheduler.schedule()
    assert plan == StepPlan()
    scheduler.confirm_stopped(reservation)
    assert step(scheduler) == {"a": 1}


def test_a_resumed_request_is_computed_with_its_output_and_counts_it() -> None:
    scheduler, _ = make_scheduler()
    sequence = make_sequence("a", [1, 2, 3, 4, 5], num_prompt_tokens=3, max_tokens=4)
    scheduler.add(sequence)
    plan = scheduler.schedule()
    assert scheduled(plan) == {"a": 5}
    assert [u.finish_reason for u in commit(scheduler, plan)] == [None]
    (update,) = commit(scheduler, scheduler.schedule())
    assert update.finish_reason == "length"
    assert sequence.num_output_tokens == 4


def test_a_request_that_brings_all_its_output_is_refused() -> None:
    scheduler, _ = make_scheduler()
    with pytest.raises(InvalidRequestError, match="2 output tokens"):
        scheduler.add(make_sequence("a", [1, 2, 3], num_prompt_tokens=1, max_tokens=2))


@pytest.mark.parametrize("by_transfer", [False, True])
def test_what_can_never_run_is_refused(*, by_transfer: bool) -> None:
    scheduler, pool = make_scheduler(num_blocks=4)
    enter = scheduler.try_reserve if by_transfer else scheduler.add
    with pytest.raises(ContextLengthError):
        enter(make_sequence("long", [1] * 16))
    with pytest.raises(InvalidRequestError, match="empty"):
        enter(make_sequence("empty", []))
    enter(make_sequence("a", [1]))
    with pytest.raises(InvalidRequestError, match="already"):
        enter(make_sequence("a", [1]))
    assert pool.counts.referenced == (1 if by_transfer else 0)


def test_the_batch_never_outgrows_the_token_budget() -> None:
    scheduler, _ = make_scheduler(max_num_seqs=8, budget=3)
    for i in range(5):
        scheduler.add(make_sequence(str(i), [1]))
    for _ in range(4):
        assert sum(step(scheduler).values()) == 3
    assert scheduler.num_running == 3


def test_several_tokens_a_step_end_at_the_one_that_stops() -> None:
    scheduler, _ = make_scheduler()
    scheduler.add(make_sequence("a", [1] * 4, max_tokens=3))
    (update,) = scheduler.commit(scheduler.schedule(), [[5, 6, 7, 8]])
    assert update.new_token_ids == [5, 6, 7]
    assert update.finish_reason == "length"
