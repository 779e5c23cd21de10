"""Order, fairness and limits of the router's queue, on a clock of the test's own."""

import asyncio

import pytest

from protocol.errors import OverloadedError
from services.router.dispatch.admission import Admission, AdmissionPolicy, AdmissionQueue


class Setup:
    def __init__(self, capacity: int | None = 1, **policy: float) -> None:
        self.capacity = capacity
        self.now_s = 0.0
        self.queue = AdmissionQueue(
            lambda: self.capacity,
            AdmissionPolicy(**policy),  # type: ignore[arg-type]
            clock=lambda: self.now_s,
        )

    def enter(self, client: str = "a", *, priority: int = 0, num_sequences: int = 1) -> Admission:
        self.now_s += 0.001
        return self.queue.enter(client=client, priority=priority, num_sequences=num_sequences)

    def order_of(self, waiting: dict[str, Admission], first: Admission) -> list[str]:
        """Names in the order in which they get the one place."""
        order: list[str] = []
        current = first
        while len(order) < len(waiting):
            current.leave()
            (name,) = [n for n, a in waiting.items() if a.is_admitted]
            order.append(name)
            current = waiting[name]
        return order


async def test_what_fits_is_admitted_at_once() -> None:
    setup = Setup(capacity=2)
    first, second, third = setup.enter(), setup.enter(), setup.enter()
    assert await first.granted()
    assert await second.granted()
    assert not third.is_admitted
    assert (setup.queue.num_admitted, setup.queue.num_waiting) == (2, 1)
    first.leave()
    assert await third.granted()


async def test_priority_goes_before_arrival() -> None:
    setup = Setup()
    first = setup.enter()
    waiting = {
        "late": setup.enter(priority=0),
        "later": setup.enter(priority=0),
        "urgent": setup.enter(priority=-1),
        "idle": setup.enter(priority=5),
    }
    assert setup.order_of(waiting, first) == ["urgent", "late", "later", "idle"]


async def test_a_burst_of_one_client_delays_others_by_one_request() -> None:
    setup = Setup(capacity=2)
    running = [setup.enter("burst"), setup.enter("burst")]
    burst = [setup.enter("burst") for _ in range(3)]
    other = setup.enter("other")
    running[0].leave()
    assert other.is_admitted
    assert not any(admission.is_admitted for admission in burst)
    other.leave()
    assert [admission.is_admitted for admission in burst] == [True, False, False]


async def test_a_request_of_many_sequences_counts_as_many() -> None:
    setup = Setup(capacity=4)
    many = setup.enter(num_sequences=4)
    one = setup.enter()
    assert not one.is_admitted
    many.leave()
    assert one.is_admitted
    assert setup.queue.num_admitted == 1


async def test_a_request_larger_than_all_capacity_still_runs() -> None:
    setup = Setup(capacity=2)
    assert setup.enter(num_sequences=100).is_admitted


async def test_leaving_while_waiting_ends_the_wait() -> None:
    setup = Setup()
    running = setup.enter()
    waiting = setup.enter()
    granted = asyncio.create_task(waiting.granted())
    await asyncio.sleep(0)
    waiting.leave()
    assert not await granted
    waiting.leave()
    running.leave()
    assert (setup.queue.num_admitted, setup.queue.num_waiting) == (0, 0)


async def test_leaving_twice_frees_one_place() -> None:
    setup = Setup(capacity=1)
    first = setup.enter()
    second, third = setup.enter(), setup.enter()
    first.leave()
    first.leave()
    assert second.is_admitted
    assert not third.is_admitted


async def test_new_workers_let_more_in() -> None:
    setup = Setup(capacity=0)
    admission = setup.enter()
    assert not admission.is_admitted
    setup.capacity = 1
    setup.queue.update()
    assert admission.is_admitted


async def test_unknown_capacity_lets_everything_through() -> None:
    setup = Setup(capacity=None)
    assert all(setup.enter().is_admitted for _ in range(100))


async def test_a_full_queue_refuses() -> None:
    setup = Setup(max_waiting=1)
    setup.enter()
    setup.enter()
    with pytest.raises(OverloadedError, match="1 requests are waiting") as raised:
        setup.enter()
    assert raised.value.retry_after_s == 1.0
    assert setup.queue.num_waiting == 1


async def test_without_a_queue_only_what_would_wait_is_refused() -> None:
    setup = Setup(max_waiting=0)
    assert setup.enter().is_admitted
    with pytest.raises(OverloadedError):
        setup.enter()


async def test_a_wait_beyond_the_deadline_is_refused_at_once() -> None:
    setup = Setup(max_wait_s=100.0)
    current = setup.enter()
    waiting = [setup.enter() for _ in range(20)]
    for following in waiting[:10]:
        setup.now_s += 30.0
        current.leave()
        current = following
    # Ten wait, and each place takes 30 s to become free.
    with pytest.raises(OverloadedError) as raised:
        setup.enter()
    assert raised.value.retry_after_s == pytest.approx(300.0, rel=0.01)


async def test_the_deadline_ends_a_wait() -> None:
    setup = Setup(max_wait_s=0.01)
    setup.enter()
    waiting = setup.enter()
    with pytest.raises(OverloadedError, match="in time"):
        await waiting.granted()
    assert setup.queue.num_waiting == 0
