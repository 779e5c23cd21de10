"""How prompts are admitted and share steps: the policy of engine/scheduler/prompts.py."""

from zlib import crc32

import pytest

from engine.block_pool import BlockPool
from engine.scheduler.config import SchedulerConfig
from engine.scheduler.plan import StepPlan
from engine.scheduler.prefill import PrefillScheduler
from engine.sequence import Sequence
from protocol.block_hash import root_hash
from protocol.errors import ContextLengthError, InvalidRequestError
from protocol.ids import RequestKey
from protocol.request import Request
from protocol.sampling import SamplingParams

BLOCK_SIZE = 16


def make_scheduler(
    *,
    num_blocks: int = 1000,
    max_num_seqs: int = 8,
    budget: int = 256,
    enable_prefix_caching: bool = True,
    short_prompts_pass: bool = True,
) -> PrefillScheduler:
    pool = BlockPool(num_blocks, BLOCK_SIZE, enable_prefix_caching=enable_prefix_caching)
    config = SchedulerConfig(
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=budget,
        max_model_len=100_000,
        short_prompts_pass=short_prompts_pass,
    )
    return PrefillScheduler(pool, config)


def prompt(name: str, length: int, *, shared: int = 0) -> list[int]:
    """`shared` tokens that all prompts have in common, then its own."""
    own = 1 + crc32(name.encode()) % 2**31
    return [0] * shared + [own] * (length - shared)


def add(
    scheduler: PrefillScheduler,
    name: str,
    length: int,
    *,
    shared: int = 0,
    priority: int = 0,
    arrival_s: float = 0.0,
    salt: str | None = None,
) -> Sequence:
    token_ids = prompt(name, length, shared=shared)
    request = Request(
        key=RequestKey(name, 0),
        token_ids=token_ids,
        num_prompt_tokens=length,
        sampling=SamplingParams(max_tokens=10),
        priority=priority,
    )
    sequence = Sequence(request, root_hash("m", cache_salt=salt), arrival_s)
    scheduler.add(sequence)
    return sequence


def shares(plan: StepPlan) -> dict[str, int]:
    return {item.sequence.key.request_id: item.num_new_tokens for item in plan.scheduled}


def step(scheduler: PrefillScheduler, *, release: bool = True) -> dict[str, int]:
    plan = scheduler.schedule()
    for update in scheduler.commit(plan, [[1] for item in plan.scheduled if item.samples]):
        if release:
            scheduler.release(update.sequence)
    return shares(plan)


def test_long_prompts_run_in_chunks_and_sample_at_their_end() -> None:
    scheduler = make_scheduler()
    add(scheduler, "a", 600)
    samples = []
    for _ in range(3):
        plan = scheduler.schedule()
        samples.append([(item.num_new_tokens, item.samples) for item in plan.scheduled])
        scheduler.commit(plan, [[1] for item in plan.scheduled if item.samples])
    assert samples == [[(256, False)], [(256, False)], [(88, True)]]


def test_chunks_that_do_not_end_a_prompt_end_with_a_block() -> None:
    scheduler = make_scheduler(budget=100)
    add(scheduler, "a", 300)
    assert step(scheduler) == {"a": 96}
    add(scheduler, "b", 20)
    assert step(scheduler) == {"b": 20, "a": 80}


def test_what_alignment_leaves_admits_nobody() -> None:
    scheduler = make_scheduler(budget=100)
    add(scheduler, "a", 300)
    add(scheduler, "b", 300)
    assert step(scheduler) == {"a": 96}
    assert scheduler.num_waiting == 1


def test_a_step_smaller_than_a_block_still_makes_progress() -> None:
    scheduler = make_scheduler(budget=10)
    add(scheduler, "a", 25)
    assert [step(scheduler)["a"] for _ in range(3)] == [10, 6, 9]


def test_prompts_run_by_priority_then_arrival() -> None:
    scheduler = make_scheduler(budget=100)
    add(scheduler, "late", 96, arrival_s=2.0)
    add(scheduler, "early", 96, arrival_s=1.0)
    add(scheduler, "urgent", 96, arrival_s=3.0, priority=-1)
    assert list(step(scheduler)) == ["urgent", "early"]
    assert list(step(scheduler)) == ["early", "late"]


def test_max_num_seqs_bounds_what_runs() -> None:
    scheduler = make_scheduler(max_num_seqs=2)
    for name in "abc":
        add(scheduler, name, 10)
    assert list(step(scheduler)) == ["a", "b"]
    assert (scheduler.num_running, scheduler.num_waiting) == (0, 1)
    assert list(step(scheduler)) == ["c"]


def test_a_short_prompt_passes_a_long_one_through_half_of_the_step() -> None:
    scheduler = make_scheduler()
    add(scheduler, "long", 10_000)
    step(scheduler)
    add(scheduler, "short", 100, arrival_s=1.0)
    assert step(scheduler) == {"short": 100, "long": 144}
    for name in "vwxyz":
        add(scheduler, name, 100, arrival_s=2.0)
    assert step(scheduler) == {"v": 100, "w": 16, "long": 128}


def test_the_first_prompt_always_keeps_half_of_the_step() -> None:
    scheduler = make_scheduler()
    long = add(scheduler, "long", 4096)
    step(scheduler)
    num_steps = 1
    while long.num_computed_tokens < 4096:
        add(scheduler, f"short{num_steps}", 256, arrival_s=float(num_steps))
        shared = step(scheduler)
        assert shared["long"] >= 128 or long.num_uncomputed_tokens <= 1
        num_steps += 1
    assert num_steps <= 2 * 4096 // 256


def test_prompts_of_about_equal_length_run_one_after_the_other() -> None:
    scheduler = make_scheduler()
    add(scheduler, "a", 1024)
    step(scheduler)
    add(scheduler, "b", 600, arrival_s=1.0)
    assert step(scheduler) == {"a": 256}


def test_a_less_urgent_prompt_does_not_pass() -> None:
    scheduler = make_scheduler()
    add(scheduler, "long", 10_000)
    step(scheduler)
    add(scheduler, "short", 100, priority=1)
    assert step(scheduler) == {"long": 256}


def test_a_cached_prompt_counts_as_short() -> None:
    scheduler = make_scheduler()
    add(scheduler, "first", 1024)
    for _ in range(4):
        step(scheduler)
    add(scheduler, "long", 1000)
    step(scheduler)
    again = add(scheduler, "first", 1024, arrival_s=1.0)
    assert step(scheduler) == {"first": 16, "long": 240}
    assert again.num_cached_tokens == 1008


def test_passing_can_be_turned_off() -> None:
    scheduler = make_scheduler(short_prompts_pass=False)
    add(scheduler, "long", 10_000)
    step(scheduler)
    add(scheduler, "short", 100, arrival_s=1.0)
    assert step(scheduler) == {"long": 256}


def test_nobody_is_admitted_behind_one_that_waits_for_blocks() -> None:
    scheduler = make_scheduler(num_blocks=20, enable_prefix_caching=False)
    first = add(scheduler, "first", 160)
    step(scheduler, release=False)
    add(scheduler, "big", 300, arrival_s=1.0)
    add(scheduler, "small", 16, arrival_s=2.0)
    assert step(scheduler) == {}
    scheduler.release(first)
    assert step(scheduler) == {"big": 256}
    assert step(scheduler) == {"big": 44, "small": 16}


def test_short_prompts_do_not_pass_one_that_waits_for_blocks() -> None:
    scheduler = make_scheduler(num_blocks=50, enable_prefix_caching=False)
    add(scheduler, "done", 160)
    step(scheduler, release=False)
    add(scheduler, "big", 700, arrival_s=1.0)
    assert step(scheduler) == {}
    add(scheduler, "urgent", 600, priority=-1)
    assert step(scheduler) == {"urgent": 256}
    add(scheduler, "small", 16, arrival_s=2.0)
    assert step(scheduler) == {"urgent": 256}


def test_short_prompts_pass_again_once_it_has_its_blocks() -> None:
    scheduler = make_scheduler(num_blocks=60, enable_prefix_caching=False)
    done = add(scheduler, "done", 160)
    step(scheduler, release=False)
    add(scheduler, "big", 900, arrival_s=1.0)
    assert step(scheduler) == {}
    scheduler.release(done)
    assert step(scheduler) == {"big": 256}
    add(scheduler, "small", 16, arrival_s=2.0)
    assert step(scheduler) == {"small": 16, "big": 240}


def test_aborting_the_one_that_waits_for_blocks_lets_others_in() -> None:
    scheduler = make_scheduler(num_blocks=20, enable_prefix_caching=False)
    add(scheduler, "first", 160)
    step(scheduler, release=False)
    big = add(scheduler, "big", 300, arrival_s=1.0)
    add(scheduler, "small", 16, arrival_s=2.0)
    assert step(scheduler) == {}
    assert scheduler.abort(big.key) is big
    assert step(scheduler) == {"small": 16}


def test_prompts_wait_for_a_prefix_that_is_being_computed() -> None:
    scheduler = make_scheduler(budget=512)
    add(scheduler, "a", 1040, shared=1024)
    followers = [add(scheduler, name, 1040, shared=1024, arrival_s=1.0) for name in "bcd"]
    assert step(scheduler) == {"a": 512}
    assert step(scheduler) == {"a": 512}
    assert step(scheduler) == {"a": 16, "b": 16, "c": 16, "d": 16}
    assert [sequence.num_cached_tokens for sequence in followers] == [1024] * 3


def test_others_do_not_wait_with_them() -> None:
    scheduler = make_scheduler(budget=512)
    add(scheduler, "a", 496, shared=480)
    add(scheduler, "b", 496, shared=480, arrival_s=1.0)
    add(scheduler, "other", 16, arrival_s=2.0)
    assert step(scheduler) == {"a": 496, "other": 16}


@pytest.mark.parametrize(
    ("shared", "own", "salt"),
    [(128, 128, None), (272, 400, None), (512, 16, "tenant")],
    ids=["little in common", "most is its own", "another tenant"],
)
def test_prompts_do_not_wait_when_it_does_not_pay(shared: int, own: int, salt: str | None) -> None:
    scheduler = make_scheduler(budget=4096)
    add(scheduler, "a", shared + own, shared=shared)
    add(scheduler, "b", shared + own, shared=shared, arrival_s=1.0, salt=salt)
    assert list(step(scheduler)) == ["a", "b"]


def test_nobody_waits_for_a_prefix_that_will_not_be_cached() -> None:
    scheduler = make_scheduler(budget=768)
    add(scheduler, "a", 1040, shared=1024)
    step(scheduler)
    scheduler._pool.reset_cache()
    add(scheduler, "b", 1040, shared=1024, arrival_s=1.0)
    assert step(scheduler) == {"a": 272, "b": 496}


def test_who_waits_for_an_aborted_prefix_computes_it() -> None:
    scheduler = make_scheduler(budget=512)
    leader = add(scheduler, "a", 1040, shared=1024)
    add(scheduler, "b", 1040, shared=1024, arrival_s=1.0)
    step(scheduler)
    scheduler.abort(leader.key)
    plan = scheduler.schedule()
    assert shares(plan) == {"b": 512}
    assert plan.scheduled[0].sequence.num_cached_tokens == 512


def test_the_last_token_is_always_computed() -> None:
    scheduler = make_scheduler()
    add(scheduler, "a", 64)
    step(scheduler)
    again = add(scheduler, "a", 64)
    assert step(scheduler) == {"a": 16}
    assert again.num_cached_tokens == 48
    assert scheduler.prefix_stats.num_queried_tokens == 128
    assert scheduler.prefix_stats.num_hit_tokens == 48


def test_a_salt_hides_a_prefix() -> None:
    scheduler = make_scheduler()
    add(scheduler, "a", 64)
    step(scheduler)
    add(scheduler, "a", 64, salt="tenant")
    assert step(scheduler) == {"a": 64}


def test_a_retained_sequence_keeps_its_blocks_until_released() -> None:
    scheduler = make_scheduler(num_blocks=4, enable_prefix_caching=False)
    sequence = add(scheduler, "a", 60)
    step(scheduler, release=False)
    assert len(sequence.block_ids) == 4
    assert (scheduler.num_retained, scheduler.num_running) == (1, 0)
    add(scheduler, "b", 60)
    assert step(scheduler) == {}
    scheduler.release(sequence)
    assert sequence.block_ids == []
    assert scheduler.num_retained == 0
    assert step(scheduler) == {"b": 60}
    scheduler.release(sequence)  # released already: nothing happens


def test_abort_works_in_every_phase_and_only_once() -> None:
    scheduler = make_scheduler(max_num_seqs=1)
    sequences = [add(scheduler, name, length) for name, length in (("a", 9), ("b", 999), ("c", 9))]
    step(scheduler, release=False)
    step(scheduler, release=False)
    counts = (scheduler.num_retained, scheduler.num_running, scheduler.num_waiting)
    assert counts == (1, 1, 1)
    for sequence in sequences:
        assert scheduler.abort(sequence.key) is sequence
        assert scheduler.abort(sequence.key) is None
    assert step(scheduler) == {}
    assert scheduler.queued_tokens == 0


def test_commit_passes_over_who_was_aborted_during_the_step() -> None:
    scheduler = make_scheduler()
    for name in "ab":
        add(scheduler, name, 10)
    plan = scheduler.schedule()
    scheduler.abort(RequestKey("a", 0))
    updates = scheduler.commit(plan, [[7], [8]])
    assert [(u.sequence.key.request_id, u.new_token_ids) for u in updates] == [("b", [8])]


def test_commit_wants_a_result_for_each_sampling_sequence() -> None:
    scheduler = make_scheduler()
    add(scheduler, "a", 10)
    with pytest.raises(ValueError, match="1 sequences sample, but 0 results came"):
        scheduler.commit(scheduler.schedule(), [])


def test_a_duplicate_request_is_refused() -> None:
    scheduler = make_scheduler()
    add(scheduler, "a", 10)
    with pytest.raises(InvalidRequestError, match="already"):
        add(scheduler, "a", 10)
    assert scheduler.num_waiting == 1


def test_a_prompt_larger_than_the_pool_is_refused() -> None:
    scheduler = make_scheduler(num_blocks=4)
    with pytest.raises(ContextLengthError, match="64 tokens, but this worker's KV cache holds 64"):
        add(scheduler, "a", 64)
    assert scheduler.max_model_len == 64
    assert scheduler.num_waiting == 0
