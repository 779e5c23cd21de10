"""Decode's batch: joining, growth, preemption, reservations, cancellation."""

import pytest

from engine.block_pool import BlockCounts, BlockPool
from engine.phase import Phase, PhaseError
from engine.scheduler.config import SchedulerConfig
from engine.scheduler.decode import DecodeScheduler
from engine.scheduler.plan import SequenceUpdate, StepPlan
from engine.scheduler.reservations import Reservation
from engine.sequence import Sequence
from protocol.block_hash import root_hash
from protocol.errors import ContextLengthError, InvalidRequestError
from protocol.ids import RequestKey
from protocol.request import Request
from protocol.sampling import SamplingParams

ROOT = root_hash("model")
BLOCK_SIZE = 4


def make_scheduler(
    num_blocks: int = 100,
    *,
    max_num_seqs: int = 8,
    budget: int = 64,
    mixed_budget: int | None = None,
    enable_prefix_caching: bool = False,
) -> tuple[DecodeScheduler, BlockPool]:
    pool = BlockPool(num_blocks, BLOCK_SIZE, enable_prefix_caching=enable_prefix_caching)
    config = SchedulerConfig(
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=budget,
        max_num_mixed_tokens=mixed_budget,
        max_model_len=1000,
    )
    return DecodeScheduler(pool, config), pool


def make_sequence(
    name: str,
    token_ids: list[int],
    *,
    num_prompt_tokens: int | None = None,
    max_tokens: int = 100,
    arrival_s: float = 0.0,
    priority: int = 0,
) -> Sequence:
    request = Request(
        key=RequestKey(name, 0),
        token_ids=token_ids,
        num_prompt_tokens=num_prompt_tokens or len(token_ids),
        sampling=SamplingParams(max_tokens=max_tokens),
        priority=priority,
    )
    return Sequence(request, ROOT, arrival_s)


def names(sequences: list[Sequence]) -> list[str]:
    return [sequence.key.request_id for sequence in sequences]


def scheduled(plan: StepPlan) -> dict[str, int]:
    return {item.sequence.key.request_id: item.num_new_tokens for item in plan.scheduled}


def commit(scheduler: DecodeScheduler, plan: StepPlan, token_id: int = 9) -> list[SequenceUpdate]:
    return scheduler.commit(plan, [[token_id] for item in plan.scheduled if item.samples])


def step(scheduler: DecodeScheduler) -> dict[str, int]:
    plan = scheduler.schedule()
    commit(scheduler, plan)
    return scheduled(plan)


def transfer(scheduler: DecodeScheduler, sequence: Sequence, first_token_id: int = 9) -> None:
    assert scheduler.try_reserve(sequence) is not None
    sequence.token_ids.append(first_token_id)
    scheduler.admit(sequence)


def reserve(scheduler: DecodeScheduler, sequence: Sequence) -> Reservation:
    reservation = scheduler.try_reserve(sequence)
    assert reservation is not None
    return reservation


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


def test_a_transferred_sequence_joins_at_the_next_step_with_one_token() -> None:
    scheduler, pool = make_scheduler()
    sequence = make_sequence("a", [1] * 10)
    reservation = reserve(scheduler, sequence)
    assert reservation.block_ids == tuple(sequence.block_ids)
    assert (reservation.num_tokens, reservation.num_cached_blocks) == (10, 0)
    assert (scheduler.num_reserved, scheduler.num_running) == (1, 0)
    assert step(scheduler) == {}
    sequence.token_ids.append(9)
    scheduler.admit(sequence)
    assert scheduler.num_waiting == 1
    assert step(scheduler) == {"a": 1}
    assert (sequence.num_computed_tokens, sequence.num_output_tokens) == (11, 2)
    assert pool.counts.referenced == 3


def test_a_reservation_takes_the_cached_prefix_but_always_receives_the_last_block() -> None:
    scheduler, _ = make_scheduler(enable_prefix_caching=True)
    scheduler.add(make_sequence("first", [1] * 8, max_tokens=1))
    step(scheduler)
    for length, num_cached in ((8, 1), (9, 2), (12, 2)):
        sequence = make_sequence(f"n{length}", [1] * length)
        reservation = reserve(scheduler, sequence)
        assert reservation.num_cached_blocks == num_cached
        assert list(reservation.block_ids) == sequence.block_ids[num_cached:]
        assert sequence.num_cached_tokens == num_cached * BLOCK_SIZE


def test_received_blocks_can_be_hit_once_they_are_here() -> None:
    scheduler, pool = make_scheduler(enable_prefix_caching=True)
    sequence = make_sequence("a", [1] * 8)
    reserve(scheduler, sequence)
    assert pool.num_prefix_blocks(sequence.block_hashes) == 0
    sequence.token_ids.append(9)
    scheduler.admit(sequence)
    assert pool.num_prefix_blocks(sequence.block_hashes) == 2


def test_arrival_without_a_first_token_is_refused() -> None:
    scheduler, _ = make_scheduler()
    sequence = make_sequence("a", [1] * 8)
    reserve(scheduler, sequence)
    with pytest.raises(ValueError, match="without its first sampled token"):
        scheduler.admit(sequence)


def test_arrived_sequences_go_before_waiting_prompts() -> None:
    scheduler, _ = make_scheduler(max_num_seqs=2)
    for name in "ab":
        scheduler.add(make_sequence(name, [1] * 4))
    step(scheduler)
    scheduler.add(make_sequence("prompt", [2] * 4, arrival_s=1.0))
    transfer(scheduler, make_sequence("arrived", [3] * 4, arrival_s=2.0))
    assert list(step(scheduler)) == ["a", "b"]
    assert scheduler.num_waiting == 2
    scheduler.abort(RequestKey("a", 0))
    assert list(step(scheduler)) == ["b", "arrived"]


def test_arrived_sequences_can_be_preempted_and_recomputed() -> None:
    scheduler, _ = make_scheduler(num_blocks=4, max_num_seqs=1)
    scheduler.add(make_sequence("a", [1] * 7))
    step(scheduler)
    arrived = make_sequence("arrived", [3] * 3, arrival_s=1.0)
    transfer(scheduler, arrived)
    for _ in range(5):
        step(scheduler)
    plan = scheduler.schedule()
    assert plan.preempted == [arrived]
    commit(scheduler, plan)
    scheduler.abort(RequestKey("a", 0))
    assert step(scheduler) == {"arrived": 4}


def test_a_reservation_keeps_the_watermark() -> None:
    scheduler, _ = make_scheduler(num_blocks=4)
    scheduler.add(make_sequence("a", [1] * 3))
    step(scheduler)
    sequence = make_sequence("coming", [2] * 12, arrival_s=1.0)
    assert scheduler.try_reserve(sequence) is None
    assert sequence.phase is Phase.NEW
    assert scheduler.try_reserve(make_sequence("small", [2] * 8, arrival_s=1.0)) is not None


def test_local_prompts_do_not_overtake_a_refused_reservation() -> None:
    scheduler, _ = make_scheduler(num_blocks=4)
    scheduler.add(make_sequence("a", [1] * 3))
    step(scheduler)
    refused = make_sequence("coming", [2] * 12, arrival_s=1.0)
    scheduler.add(make_sequence("later", [3] * 2, arrival_s=2.0))
    assert scheduler.try_reserve(refused) is None
    assert step(scheduler) == {"a": 1}
    # Nobody asked again, so nobody waits for it any more.
    assert step(scheduler) == {"a": 1, "later": 2}


def test_an_idle_engine_computes_beside_a_refused_reservation() -> None:
    scheduler, _ = make_scheduler(num_blocks=4)
    reserve(scheduler, make_sequence("first", [1] * 8))
    assert scheduler.try_reserve(make_sequence("second", [2] * 12, arrival_s=1.0)) is None
    scheduler.add(make_sequence("local", [3] * 2, arrival_s=2.0))
    assert step(scheduler) == {"local": 2}


def test_reservations_do_not_overtake_a_prompt_that_waits_for_blocks() -> None:
    scheduler, _ = make_scheduler(num_blocks=6)
    scheduler.add(make_sequence("a", [1] * 8))
    step(scheduler)
    scheduler.add(make_sequence("big", [2] * 16, arrival_s=1.0))
    step(scheduler)
    small = make_sequence("small", [3] * 2, arrival_s=2.0)
    assert scheduler.try_reserve(small) is None
    assert scheduler.try_reserve(make_sequence("urgent", [4], priority=-1)) is not None
    scheduler.abort(RequestKey("big", 0))
    assert scheduler.try_reserve(small) is not None


def test_transfers_run_ahead_of_free_places_by_a_bounded_number() -> None:
    scheduler, _ = make_scheduler(max_num_seqs=16)
    for i in range(16):
        scheduler.add(make_sequence(f"running{i}", [1]))
    step(scheduler)
    granted = [scheduler.try_reserve(make_sequence(f"coming{i}", [2])) for i in range(4)]
    assert [reservation is not None for reservation in granted] == [True, True, False, False]


def test_cancelled_blocks_stay_in_quarantine_until_the_sender_has_stopped() -> None:
    scheduler, pool = make_scheduler(num_blocks=4, enable_prefix_caching=True)
    scheduler.add(make_sequence("first", [1] * 4, max_tokens=1))
    step(scheduler)
    sequence = make_sequence("coming", [1] * 10)
    reservation = reserve(scheduler, sequence)
    scheduler.cancel_reservation(reservation)
    assert pool.counts == BlockCounts(free=1, referenced=0, cached=1, quarantined=2, total=4)
    assert (scheduler.num_reserved, scheduler.num_stopping) == (0, 1)
    assert sequence.block_ids == []
    assert scheduler.abort(sequence.key) is None
    scheduler.confirm_stopped(reservation)
    assert pool.counts.quarantined == 0
    with pytest.raises(PhaseError):
        scheduler.confirm_stopped(reservation)


def test_aborting_a_reserved_sequence_cancels_it() -> None:
    scheduler, pool = make_scheduler(num_blocks=4)
    sequence = make_sequence("coming", [1] * 8)
    reservation = reserve(scheduler, sequence)
    assert scheduler.abort(sequence.key) is sequence
    assert sequence.phase is Phase.STOPPING
    assert pool.counts.quarantined == 2
    with pytest.raises(PhaseError):
        scheduler.cancel_reservation(reservation)
    sequence.token_ids.append(9)
    with pytest.raises(PhaseError, match="arrives, but is stopping"):
        scheduler.admit(sequence)
    scheduler.confirm_stopped(reservation)
    assert pool.counts.free == 4


def test_the_next_attempt_may_come_while_the_last_one_is_stopping() -> None:
    scheduler, _ = make_scheduler()
    reservation = reserve(scheduler, make_sequence("a", [1] * 8))
    scheduler.cancel_reservation(reservation)
    assert scheduler.try_reserve(make_sequence("a", [1] * 8)) is not None


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
