"""Reservations for transfers: making room, admission, cancellation."""

import pytest
from decode_scheduling import (
    BLOCK_SIZE,
    commit,
    make_scheduler,
    make_sequence,
    reserve,
    step,
    transfer,
)

from engine.block_pool import BlockCounts
from engine.phase import Phase, PhaseError
from protocol.ids import RequestKey


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
