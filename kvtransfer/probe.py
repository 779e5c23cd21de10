"""Measures the way between two agents, and judges whether it is the one it should be."""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass

from kvtransfer.host import is_same_host, measure_memcpy_gb_per_s, shared_memory_obstacles
from kvtransfer.transport import Arrival, OnDone
from kvtransfer.wire import AgentMessage, HostIdentity, ProbeDone, ProbeStart
from protocol.errors import TransferCancelledError, TransferTimeoutError

PROBE_BYTES = 16 << 20
PROBE_BUDGET_S = 0.06
"""After this time no further probe starts, so that a slow path isn't measured for long."""
PROBE_TIMEOUT_S = 5.0
MAX_PROBES = 4

SLOW_FRACTION = 0.2
"""Shared memory moves half of what a copying thread does even on a loaded machine; TCP a tenth."""


@dataclass(frozen=True, slots=True)
class PathReport:
    """What `Connection.measure` found. Rates are in 10⁹ bytes a second."""

    transport: str
    gb_per_s: float
    memcpy_gb_per_s: float
    same_host: bool
    is_slow_fallback: bool
    warning: str | None


class PathProbe:
    """Both ends of the measurement over one connection."""

    def __init__(
        self,
        *,
        send_control: Callable[[AgentMessage], None],
        send_data: Callable[[memoryview, int, OnDone], None],
        allocate_sequence: Callable[[], int],
    ) -> None:
        self._send_control = send_control
        self._send_data = send_data
        self._allocate_sequence = allocate_sequence
        self._answers: dict[int, asyncio.Future[None]] = {}
        self._expected: dict[int, ProbeStart] = {}
        self._scratch: memoryview | None = None
        self._closed: str | None = None

    async def measure_gb_per_s(self) -> float:
        """The best of a few messages, after one that warms the lane and the peer's memory."""
        payload = memoryview(bytearray(PROBE_BYTES))
        start = time.monotonic()
        best_s = float("inf")
        for round_number in range(MAX_PROBES + 1):
            is_last = round_number == MAX_PROBES
            seconds = await self._round(payload, is_last=is_last)
            if round_number:
                best_s = min(best_s, seconds)
            if is_last or (round_number and time.monotonic() - start > PROBE_BUDGET_S):
                break
        return PROBE_BYTES / best_s / 1e9

    def on_start(self, message: ProbeStart) -> None:
        self._expected[message.sequence] = message

    def on_done(self, message: ProbeDone) -> None:
        answer = self._answers.pop(message.probe_id, None)
        if answer is not None and not answer.done():
            answer.set_result(None)

    def take(self, sequence: int, arrival: Arrival) -> bool:
        """True if the data message belongs to a measurement; it's received into scratch memory."""
        start = self._expected.pop(sequence, None)
        if start is None:
            return False
        if arrival.num_bytes > PROBE_BYTES:
            arrival.discard()
            return True
        if self._scratch is None:
            self._scratch = memoryview(bytearray(PROBE_BYTES))
        target = self._scratch[: arrival.num_bytes]
        if start.is_last:
            self._scratch = None

        def on_received(error: str | None) -> None:
            if error is None:
                self._send_control(ProbeDone(start.probe_id))

        arrival.receive_into(target, on_received)
        return True

    def close(self, reason: str) -> None:
        self._closed = reason
        for answer in self._answers.values():
            if not answer.done():
                answer.set_exception(TransferCancelledError(reason))
        self._answers.clear()
        self._expected.clear()

    async def _round(self, payload: memoryview, *, is_last: bool) -> float:
        if self._closed is not None:
            raise TransferCancelledError(self._closed)
        sequence = self._allocate_sequence()
        answer = asyncio.get_running_loop().create_future()
        self._answers[sequence] = answer
        start = time.perf_counter()
        self._send_control(ProbeStart(sequence, sequence, is_last))
        self._send_data(payload, sequence, lambda _: None)
        try:
            async with asyncio.timeout(PROBE_TIMEOUT_S):
                await answer
        except TimeoutError as error:
            raise TransferTimeoutError("The peer did not answer the path measurement.") from error
        finally:
            self._answers.pop(sequence, None)
        return time.perf_counter() - start


def judge_path(
    transport: str, gb_per_s: float, ours: HostIdentity, theirs: HostIdentity
) -> PathReport:
    """Compares a measured rate with what one thread copies here."""
    memcpy_gb_per_s = measure_memcpy_gb_per_s()
    same_host = is_same_host(ours, theirs)
    is_slow = same_host and gb_per_s < SLOW_FRACTION * memcpy_gb_per_s
    warning = None
    if is_slow:
        obstacles = shared_memory_obstacles(ours, theirs)
        cause = " and ".join(obstacles) or "UCX_TLS or a full or small /dev/shm"
        warning = (
            f"KV transfer runs at {gb_per_s:.2f} GB/s, though both workers are on {ours.hostname} "
            f"where one thread copies {memcpy_gb_per_s:.1f} GB/s: it does not use shared memory; "
            f"likely cause: {cause}."
        )
    return PathReport(transport, gb_per_s, memcpy_gb_per_s, same_host, is_slow, warning)
