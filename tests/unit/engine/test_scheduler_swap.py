"""Preempted sequences keep their KV in host memory, as far as there is room."""

from decode_scheduling import make_scheduler, make_sequence, scheduled, step, transfer

from engine.phase import Phase
from engine.scheduler.decode import DecodeScheduler
from engine.scheduler.plan import StepPlan
from engine.scheduler.swap import BlockCopies, SwapSpace
from engine.sequence import Sequence


def run_until_preempted(scheduler: DecodeScheduler) -> StepPlan:
    while True:
        plan = scheduler.schedule()
        if plan.preempted:
            return plan
        assert not plan.copies
        scheduler.commit(plan, [[9] for item in plan.scheduled if item.samples])


def commit(scheduler: DecodeScheduler, plan: StepPlan) -> None:
    scheduler.commit(plan, [[9] for item in plan.scheduled if item.samples])


def two_sequences(scheduler: DecodeScheduler, *, num_tokens: int = 8) -> tuple[Sequence, Sequence]:
    """They have room for their prompts and little more."""
    first = make_sequence("first", [1] * num_tokens, max_tokens=8)
    second = make_sequence("second", [2] * num_tokens, arrival_s=1.0, max_tokens=20)
    scheduler.add(first)
    scheduler.add(second)
    return first, second


def test_out_and_back() -> None:
    scheduler, pool = make_scheduler(6, num_swap_blocks=8)
    first, second = two_sequences(scheduler)
    plan = run_until_preempted(scheduler)
    assert plan.preempted == [second]
    assert second.phase is Phase.SWAPPED
    assert (scheduler.num_swapped, scheduler.num_waiting, scheduler.num_running) == (1, 1, 1)
    num_computed = second.num_computed_tokens
    assert num_computed == second.num_tokens - 1 > 8
    assert len(plan.copies.out) == pool.num_blocks_for(num_computed)
    assert not plan.copies.back
    assert not second.block_ids
    assert scheduler.queued_tokens == 1
    host_blocks = [host for _, host in plan.copies.out]
    commit(scheduler, plan)
    while first.phase is not Phase.FINISHED:
        step(scheduler)
    plan = scheduler.schedule()
    assert scheduled(plan) == {"second": 1}
    assert plan.copies.back == list(zip(second.block_ids, host_blocks, strict=False))
    assert second.num_computed_tokens == num_computed
    assert scheduler.num_swapped == 0
    commit(scheduler, plan)
    assert second.phase is Phase.DECODING
    assert not scheduler.schedule().copies


def test_without_room_it_is_computed_anew() -> None:
    scheduler, _ = make_scheduler(6, num_swap_blocks=2)
    _, second = two_sequences(scheduler)
    plan = run_until_preempted(scheduler)
    assert plan.preempted == [second]
    assert second.phase is Phase.WAITING
    assert not plan.copies
    assert scheduler.queued_tokens == second.num_tokens


def test_an_abort_frees_host_blocks() -> None:
    scheduler, pool = make_scheduler(6, num_swap_blocks=3)
    first, second = two_sequences(scheduler)
    run_until_preempted(scheduler)
    assert scheduler.abort(second.key) is second
    assert second.phase is Phase.FINISHED
    assert (scheduler.num_swapped, scheduler.queued_tokens) == (0, 0)
    scheduler.abort(first.key)
    assert pool.counts.referenced == 0
    _, second = two_sequences(scheduler)
    assert run_until_preempted(scheduler).preempted == [second]
    assert second.phase is Phase.SWAPPED


def test_what_stays_cached_is_not_copied_back() -> None:
    scheduler, _ = make_scheduler(6, num_swap_blocks=8, enable_prefix_caching=True)
    first, second = two_sequences(scheduler)
    plan = run_until_preempted(scheduler)
    assert len(plan.copies.out) == 3
    scheduler.abort(first.key)
    plan = scheduler.schedule()
    assert scheduled(plan) == {"second": 1}
    # One block was cached and had to go for the first sequence's growth at most.
    assert 1 <= len(plan.copies.back) <= 2
    assert plan.copies.back[-1][0] == second.block_ids[2]


def test_half_a_prompt_goes_on_where_it_was() -> None:
    scheduler, _ = make_scheduler(9, num_swap_blocks=8, mixed_budget=2, budget=8)
    transfer(scheduler, make_sequence("first", [1] * 7, max_tokens=8))
    second = make_sequence("second", [2] * 23, arrival_s=1.0)
    scheduler.add(second)
    plan = run_until_preempted(scheduler)
    assert plan.preempted == [second]
    assert second.phase is Phase.SWAPPED
    num_computed = second.num_computed_tokens
    assert 0 < num_computed < 22
    assert len(plan.copies.out) == -(-num_computed // 4)
    assert scheduler.queued_tokens == 23 - num_computed
    commit(scheduler, plan)
    while not (plan := scheduler.schedule()).copies:
        commit(scheduler, plan)
    assert len(plan.copies.back) == -(-num_computed // 4)
    assert second.phase is Phase.PREFILLING
    assert second.num_computed_tokens == num_computed


def test_the_books_of_host_blocks() -> None:
    space = SwapSpace(5)
    a, b, c = (make_sequence(name, [1] * 12) for name in "abc")
    a.block_ids, b.block_ids, c.block_ids = [7, 8, 9], [1], [4, 5]
    assert space.put(a, 3)
    assert space.put(b, 1)
    assert not space.put(c, 2)
    assert (len(space), space.num_free_blocks) == (2, 1)
    assert space.drain() == BlockCopies(out=[(7, 0), (8, 1), (9, 2), (1, 3)])
    assert not space.drain()
    a.block_ids = [2, 3, 6, 8]
    space.take(a, 1)
    assert space.put(c, 2)
    assert space.drain() == BlockCopies(out=[(4, 0), (5, 1)], back=[(3, 1), (6, 2)])
    space.drop(b)
    space.drop(c)
    assert (len(space), space.num_free_blocks) == (0, 5)
