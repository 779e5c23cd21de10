"""The router's queue: requests beyond what the workers can hold wait here, in a fair order.

Lower priority numbers go first, as in vLLM. Among equals the client (API key) that has the fewest
sequences on the workers is next, and of its requests the oldest; so one client's burst delays the
others by a request each, not by the burst.
"""

import asyncio
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from protocol.errors import OverloadedError

SMOOTHING = 0.05


@dataclass(frozen=True, slots=True)
class AdmissionPolicy:
    """How many and how long requests may wait."""

    max_waiting: int = 10_000
    max_wait_s: float = 600.0
    least_retry_after_s: float = 1.0


class Admission:
    """One request's place in the queue or, later, among the admitted. `leave` ends both."""

    def __init__(
        self, queue: "AdmissionQueue", *, client: str, priority: int, num_sequences: int
    ) -> None:
        self.client = client
        self.priority = priority
        self.num_sequences = num_sequences
        self.arrival_s = 0.0
        self.is_admitted = False
        self._queue = queue
        self._decided: asyncio.Future[bool] = asyncio.get_running_loop().create_future()

    async def granted(self) -> bool:
        """Waits for admission; False if `leave` came first.

        Raises OverloadedError if that takes longer than the policy allows.
        """
        if self._decided.done():
            return self._decided.result()
        try:
            async with asyncio.timeout(self._queue.policy.max_wait_s):
                return await asyncio.shield(self._decided)
        except TimeoutError:
            self.leave()
            raise self._queue.overloaded("No worker had room for the request in time.") from None

    def leave(self) -> None:
        """The request is over, or isn't wanted any more."""
        self._queue.left(self)
        self.decide(admitted=False)

    def decide(self, *, admitted: bool) -> None:
        """For the queue."""
        if not self._decided.done():
            self.is_admitted = admitted
            self._decided.set_result(admitted)


class AdmissionQueue:
    """`capacity` says how many sequences the workers take now; None means that nobody knows, and
    everything is let through. `policy` may be replaced at any time; who waits already keeps the old
    deadline."""

    def __init__(
        self,
        capacity: Callable[[], int | None],
        policy: AdmissionPolicy | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.policy = policy or AdmissionPolicy()
        self._capacity = capacity
        self._clock = clock
        self._waiting: dict[int, dict[str, deque[Admission]]] = {}
        self._num_waiting = 0
        self._num_by_client: dict[str, int] = {}
        self._num_admitted = 0
        self._last_end_s: float | None = None
        self._s_per_end: float | None = None

    @property
    def num_waiting(self) -> int:
        """Requests."""
        return self._num_waiting

    @property
    def num_admitted(self) -> int:
        """Sequences."""
        return self._num_admitted

    def enter(self, *, client: str, priority: int, num_sequences: int) -> Admission:
        """Raises OverloadedError if the queue is too long, in requests or in expected time."""
        self.update()
        admission = Admission(self, client=client, priority=priority, num_sequences=num_sequences)
        # Who still waits does so because it's full.
        if not self._num_waiting and not self._is_full():
            self._admit(admission)
            return admission
        if self._expects_too_long():
            raise self.overloaded(f"{self._num_waiting} requests are waiting already.")
        admission.arrival_s = self._clock()
        clients = self._waiting.setdefault(priority, {})
        clients.setdefault(client, deque()).append(admission)
        self._num_waiting += 1
        return admission

    def update(self) -> None:
        """Admits whom there is room for. To be called when workers came or went."""
        while self._num_waiting and not self._is_full():
            admission = self._next()
            self._remove(admission)
            self._admit(admission)

    def left(self, admission: Admission) -> None:
        """For `Admission.leave`; a second call does nothing."""
        if admission.is_admitted:
            admission.is_admitted = False
            self._num_admitted -= admission.num_sequences
            left = self._num_by_client[admission.client] - admission.num_sequences
            if left:
                self._num_by_client[admission.client] = left
            else:
                del self._num_by_client[admission.client]
            self._measure_end()
            self.update()
        elif admission in self._waiting.get(admission.priority, {}).get(admission.client, ()):
            self._remove(admission)

    def overloaded(self, message: str) -> OverloadedError:
        """With the time after which the present queue should be gone."""
        expected_s = self._num_waiting * (self._s_per_end or 0.0)
        return OverloadedError(
            message, retry_after_s=max(self.policy.least_retry_after_s, expected_s)
        )

    def _admit(self, admission: Admission) -> None:
        client, num_sequences = admission.client, admission.num_sequences
        self._num_admitted += num_sequences
        self._num_by_client[client] = self._num_by_client.get(client, 0) + num_sequences
        admission.decide(admitted=True)

    def _is_full(self) -> bool:
        capacity = self._capacity()
        return capacity is not None and self._num_admitted >= capacity

    def _expects_too_long(self) -> bool:
        expected_s = self._num_waiting * (self._s_per_end or 0.0)
        return self._num_waiting >= self.policy.max_waiting or expected_s > self.policy.max_wait_s

    def _next(self) -> Admission:
        clients = self._waiting[min(self._waiting)]
        return min(
            (queue[0] for queue in clients.values()),
            key=lambda first: (self._num_by_client.get(first.client, 0), first.arrival_s),
        )

    def _remove(self, admission: Admission) -> None:
        clients = self._waiting[admission.priority]
        queue = clients[admission.client]
        queue.remove(admission)
        self._num_waiting -= 1
        if not queue:
            del clients[admission.client]
            if not clients:
                del self._waiting[admission.priority]

    def _measure_end(self) -> None:
        """How fast places become free, while there are requests that wait for them."""
        now_s = self._clock()
        if self._last_end_s is not None and self._num_waiting:
            gap_s = now_s - self._last_end_s
            before_s = gap_s if self._s_per_end is None else self._s_per_end
            self._s_per_end = before_s + SMOOTHING * (gap_s - before_s)
        self._last_end_s = now_s if self._num_waiting else None
