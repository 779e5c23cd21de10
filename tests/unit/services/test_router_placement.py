"""Each term of the placement cost by hand, and laws that hold for any cluster."""

import dataclasses
from collections.abc import Sequence

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.router.placement.candidates import (
    DecodeCandidate,
    LineRates,
    PlacementPolicy,
    PrefillCandidate,
    RequestFacts,
)
from services.router.placement.placement import Option, Placement, options, place

POLICY = PlacementPolicy(handoff_ms=1.0)
REQUEST = RequestFacts(num_tokens=1000, num_output_tokens=100)
MB_PER_TOKEN = 1_000_000


def prefill(worker_id: str = "p", **changes: object) -> PrefillCandidate:
    base = PrefillCandidate(worker_id=worker_id, ms_per_token=1.0, max_num_batched_tokens=200)
    return msgspec.structs.replace(base, **changes)


def decode(worker_id: str = "d", **changes: object) -> DecodeCandidate:
    base = DecodeCandidate(
        worker_id=worker_id,
        num_blocks=1000,
        num_free_blocks=1000,
        token_bytes=MB_PER_TOKEN,
        ms_per_token=1.0,
        ms_per_step=10.0,
        ms_per_sequence=0.5,
    )
    return msgspec.structs.replace(base, **changes)


def chosen(
    p: Sequence[PrefillCandidate],
    d: Sequence[DecodeCandidate],
    *,
    request: RequestFacts = REQUEST,
    policy: PlacementPolicy = POLICY,
) -> Option:
    placement = place(request, p, d, policy)
    assert placement is not None
    return placement.chosen


def both_kinds(p: PrefillCandidate, d: DecodeCandidate) -> Placement:
    placement = place(REQUEST, [p], [d], POLICY)
    assert placement is not None
    return placement


def test_prefill_is_queue_plus_uncached_tokens() -> None:
    cost = chosen([prefill(num_queued_tokens=300, num_cached_tokens=400)], [decode()]).cost
    assert cost.prefill_queue_ms == 300
    assert cost.prefill_ms == 600


def test_a_wholly_cached_prompt_still_computes_its_last_token() -> None:
    assert chosen([prefill(num_cached_tokens=1000)], [decode()]).cost.prefill_ms == 1


@pytest.mark.parametrize(
    ("cached_at_p", "cached_at_d", "gb_per_s", "expected_ms"),
    [
        pytest.param(0, 0, 10.0, 1 + 20, id="the last chunk of 200 tokens"),
        pytest.param(0, 900, 10.0, 1 + 10, id="less than a chunk is missing at D"),
        pytest.param(0, 1000, 10.0, 1, id="nothing is missing at D"),
        pytest.param(950, 0, 10.0, 1 + 50, id="what is cached at P travels while 50 compute"),
        pytest.param(0, 0, 0.5, 1 + 1000, id="a line slower than prefill"),
    ],
)
def test_transfer_counts_as_far_as_it_is_exposed(
    cached_at_p: int, cached_at_d: int, gb_per_s: float, expected_ms: float
) -> None:
    p = prefill(num_cached_tokens=cached_at_p, line_rates=LineRates.of({"d": gb_per_s}))
    remote = both_kinds(p, decode(num_cached_tokens=cached_at_d)).best_remote
    assert remote is not None
    assert remote.cost.exposed_transfer_ms == pytest.approx(expected_ms)


def test_waiting_for_a_slot_counts_as_far_as_prefill_does_not_hide_it() -> None:
    # 4 sequences end every 100 × 10 ms, so one of them in 250 ms; 3 have to.
    busy = decode(num_running=4, max_num_seqs=4, num_waiting=2)
    slow_line = both_kinds(prefill(), busy)
    assert slow_line.best_remote is not None
    assert slow_line.best_local is not None
    assert slow_line.best_local.cost.decode_wait_ms == 750
    # Computed after 1000 ms, all there 200 ms later; the line itself needs 1000 ms from 750 on.
    assert slow_line.best_remote.cost.decode_wait_ms == 1750 - 1200
    fast_line = both_kinds(prefill(line_rates=LineRates.of({"d": 100.0})), busy)
    assert fast_line.best_remote is not None
    assert fast_line.best_remote.cost.decode_wait_ms == 0


def test_waiting_for_blocks() -> None:
    # 63 blocks are needed, 23 free; each of 10 sequences holds 20, so two have to end.
    full = decode(num_blocks=223, num_free_blocks=23, num_running=10)
    local = both_kinds(prefill(), full).best_local
    assert local is not None
    assert local.cost.decode_wait_ms == 2 * 100


def test_cached_blocks_need_no_room() -> None:
    full = decode(num_blocks=223, num_free_blocks=23, num_running=10, num_cached_tokens=640)
    local = both_kinds(prefill(), full).best_local
    assert local is not None
    assert local.cost.decode_wait_ms == 0


def test_slowdown_is_for_every_sequence_and_step() -> None:
    placement = both_kinds(prefill(), decode(num_running=6, num_waiting=2))
    assert placement.best_remote is not None
    assert placement.best_local is not None
    assert placement.best_remote.cost.slowdown_ms == 8 * 0.5 * 100
    assert placement.best_local.cost.slowdown_ms == 8 * 0.5 * 100 + 8 * 1000


def test_an_idle_pair_prefills_remotely() -> None:
    assert chosen([prefill()], [decode()]).prefill == "p"


@pytest.mark.parametrize("num_tokens", [1, 2])
def test_a_prompt_shorter_than_its_handover_stays_local(num_tokens: int) -> None:
    request = RequestFacts(num_tokens, 100)
    policy = dataclasses.replace(POLICY, handoff_ms=3.0)
    assert chosen([prefill()], [decode()], request=request, policy=policy).prefill is None


def test_what_only_decode_has_cached_is_prefilled_there() -> None:
    option = chosen([prefill()], [decode(num_cached_tokens=992)])
    assert (option.prefill, option.num_cached_tokens) == (None, 992)
    assert chosen([prefill()], [decode(num_cached_tokens=992, num_running=200)]).prefill == "p"


def test_a_long_queue_at_prefill_moves_work_to_decode() -> None:
    assert chosen([prefill(num_queued_tokens=1010)], [decode()]).prefill is None


def test_without_prefill_workers_decode_does_it() -> None:
    for mode in ("auto", "never", "always"):
        policy = PlacementPolicy(local_prefill=mode)
        assert chosen([], [decode()], policy=policy).prefill is None


def test_modes() -> None:
    cached_at_decode = decode(num_cached_tokens=1000)
    never, always = (PlacementPolicy(local_prefill=mode) for mode in ("never", "always"))
    assert chosen([prefill()], [cached_at_decode], policy=never).prefill == "p"
    assert chosen([prefill()], [decode()], policy=always).prefill is None


def test_a_worker_too_small_for_the_request_is_no_candidate() -> None:
    assert place(REQUEST, [prefill()], [decode(num_blocks=62)], POLICY) is None
    assert place(REQUEST, [prefill()], [], POLICY) is None
    placed = chosen([prefill()], [decode("small", num_blocks=62), decode("large", num_running=99)])
    assert placed.decode == "large"


def test_pairs_of_different_layouts_are_none() -> None:
    p = [prefill("p1", layout="a"), prefill("p2", layout="b", num_queued_tokens=500)]
    assert chosen(p, [decode(layout="b")]).prefill == "p2"
    assert chosen(p, [decode(layout="c")]).prefill is None


def test_the_faster_line_wins() -> None:
    p = prefill(line_rates=LineRates.of({"near": 10.0, "far": 1.0}))
    assert chosen([p], [decode("far"), decode("near")]).decode == "near"


def test_unmeasured_workers_count_as_the_average_of_the_others() -> None:
    p = [prefill("slow", ms_per_token=3.0), prefill("new", ms_per_token=None)]
    option = chosen(p, [decode(ms_per_token=None)])
    assert option.cost.prefill_ms == 3000
    p.append(prefill("fast", ms_per_token=1.0))
    assert chosen(p, [decode(ms_per_token=None)]).prefill == "fast"
    nobody = chosen([prefill(ms_per_token=None)], [decode(ms_per_token=None)])
    assert nobody.cost.prefill_ms == 1000 * POLICY.prefill_ms_per_token


def test_equal_workers_take_turns() -> None:
    p = [prefill(f"p{n}") for n in range(3)]
    d = [decode(f"d{n}") for n in range(2)]
    pairs = set()
    for turn in range(6):
        option = chosen(p, d, request=msgspec.structs.replace(REQUEST, tie_breaker=turn))
        pairs.add((option.prefill, option.decode))
    assert len(pairs) == 6


RATES = st.none() | st.floats(0.01, 10.0)
PREFILL_WORKERS = st.builds(
    PrefillCandidate,
    worker_id=st.just(""),
    layout=st.sampled_from(["a", "a", "b"]),
    num_cached_tokens=st.integers(0, 400),
    num_queued_tokens=st.integers(0, 2000),
    max_num_batched_tokens=st.sampled_from([64, 512]),
    ms_per_token=RATES,
    line_rates=st.dictionaries(
        st.sampled_from([f"d{n}" for n in range(5)]), st.floats(0.001, 100.0)
    ).map(LineRates.of),
)
DECODE_WORKERS = st.builds(
    DecodeCandidate,
    worker_id=st.just(""),
    layout=st.sampled_from(["a", "a", "b"]),
    token_bytes=st.just(100_000),
    num_cached_tokens=st.integers(0, 400),
    num_queued_tokens=st.integers(0, 500),
    num_running=st.integers(0, 40),
    num_waiting=st.integers(0, 10),
    max_num_seqs=st.sampled_from([8, 64]),
    num_blocks=st.integers(10, 300),
    num_free_blocks=st.integers(0, 100),
    ms_per_token=RATES,
    ms_per_step=RATES,
    ms_per_sequence=RATES,
)


def named(workers: list, letter: str) -> list:
    return [
        msgspec.structs.replace(worker, worker_id=f"{letter}{n}")
        for n, worker in enumerate(workers)
    ]


REQUESTS = st.builds(
    RequestFacts,
    num_tokens=st.integers(1, 600),
    num_output_tokens=st.integers(1, 500),
    tie_breaker=st.integers(0, 100),
)
MODES = st.sampled_from(["auto", "never", "always"])
PREFILL_POOLS = st.lists(PREFILL_WORKERS, max_size=5).map(lambda workers: named(workers, "p"))
DECODE_POOLS = st.lists(DECODE_WORKERS, max_size=5).map(lambda workers: named(workers, "d"))


@settings(deadline=None, max_examples=300)
@given(REQUESTS, PREFILL_POOLS, DECODE_POOLS, MODES)
def test_nothing_is_cheaper_than_the_choice(request_, p, d, mode) -> None:
    policy = PlacementPolicy(local_prefill=mode)
    allowed = list(options(request_, p, d, policy))
    remote = [option for option in allowed if option.prefill is not None]
    if mode == "never" and remote:
        allowed = remote
    elif mode == "always":
        allowed = [option for option in allowed if option.prefill is None]
    placement = place(request_, p, d, policy)
    if placement is None:
        assert not allowed
        return
    cheapest = min(option.cost.total_ms for option in allowed)
    assert placement.chosen.cost.total_ms == pytest.approx(cheapest)
    assert placement.chosen in allowed
    for term in msgspec.structs.astuple(placement.chosen.cost):
        assert term >= 0.0


WORSE_PREFILL = {
    "num_queued_tokens": lambda worker: worker.num_queued_tokens + 100,
    "num_cached_tokens": lambda worker: worker.num_cached_tokens // 2,
}
WORSE_DECODE = {
    "num_queued_tokens": lambda worker: worker.num_queued_tokens + 100,
    "num_waiting": lambda worker: worker.num_waiting + 3,
    "num_free_blocks": lambda worker: worker.num_free_blocks // 2,
    "num_cached_tokens": lambda worker: worker.num_cached_tokens // 2,
}


@settings(deadline=None, max_examples=200)
@given(REQUESTS, PREFILL_POOLS, DECODE_POOLS, st.data())
def test_more_load_or_less_cache_never_attracts(request_, p, d, data) -> None:
    placement = place(request_, p, d, POLICY)
    if placement is None:
        return
    before = {(o.prefill, o.decode): o for o in options(request_, p, d, POLICY)}
    pool, worse = data.draw(st.sampled_from([(p, WORSE_PREFILL), (d, WORSE_DECODE)]))
    if not pool:
        return
    place_in_pool = data.draw(st.integers(0, len(pool) - 1))
    name = data.draw(st.sampled_from(sorted(worse)))
    worker = pool[place_in_pool]
    pool[place_in_pool] = msgspec.structs.replace(worker, **{name: worse[name](worker)})
    for option in options(request_, p, d, POLICY):
        old = before[option.prefill, option.decode]
        if worker.worker_id in (option.prefill, option.decode):
            assert option.cost.total_ms >= old.cost.total_ms - 1e-6
        else:
            assert option.cost == old.cost
    after = place(request_, p, d, POLICY)
    assert after is not None
    was_in = worker.worker_id in (placement.chosen.prefill, placement.chosen.decode)
    is_in = worker.worker_id in (after.chosen.prefill, after.chosen.decode)
    if is_in and not was_in:
        # Only a tie may bring it in: nothing got cheaper.
        assert after.chosen.cost.total_ms == pytest.approx(placement.chosen.cost.total_ms)
