"""Measures the way between two agents, and judges whether it is the one it should be."""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass

from kvtransfer.buffer import Buffer
from kvtransfer.host import is_same_host, measure_memcpy_gb_per_s, memory_access_obstacles
from kvtransfer.pool_reader import PoolReader
from kvtransfer.transport import Arrival, OnDone
from kvtransfer.wire import AgentMessage, HostIdentity, ProbeDone, ProbeRead, ProbeStart
from protocol.errors import TransferCancelledError, TransferTimeoutError

PROBE_BYTES = 16 << 20
PROBE_READ_BYTES = 128 << 20
"""What a peer on a GPU of this host reads takes so little time that less would measure the
messages."""
NUM_PROBES = 5
"""The first one warms the lane and the peer's memory, and isn't counted."""
PROBE_BUDGET_S = 0.06
"""After this time no further probe starts, so that a slow path isn't measured for long."""
PROBE_TIMEOUT_S = 5.0

SLOW_FRACTION = 0.125
"""TCP, and copies through a queue, stayed under 0.07 of a copying thread. A good path on a machine
with several times more work than processors can fall below this as well, hence "no free
processor" among the causes."""


@dataclass(frozen=True, slots=True)
class PathRates:
    """10⁹ bytes a second, the best of several messages.

    `round_trip` counts a message's whole way and its answer's; `receive` only what the receiver
    needed once it had taken the message, so it says more about the kind of path and less about
    how busy the machine is.
    """

    round_trip: float
    receive: float


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
        allocate: Callable[[int], Buffer],
        block_bytes: int,
        num_blocks: int,
        send_control: Callable[[AgentMessage], None],
        send_data: Callable[[Buffer, int, OnDone], None],
        allocate_sequence: Callable[[], int],
    ) -> None:
        self._allocate = allocate
        self._num_blocks_read = max(1, min(num_blocks, PROBE_READ_BYTES // block_bytes))
        self._num_bytes_read = self._num_blocks_read * block_bytes
        self._send_control = send_control
        self._send_data = send_data
        self._allocate_sequence = allocate_sequence
        self._answers: dict[int, asyncio.Future[float]] = {}
        self._expected: dict[int, ProbeStart] = {}
        self._scratch: Buffer | None = None
        self._closed: str | None = None

    async def measure(self, *, is_read_by_peer: bool) -> PathRates:
        """Up to five rounds; raises TransferTimeoutError if the peer doesn't answer."""
        payload = None if is_read_by_peer else self._allocate(PROBE_BYTES)
        num_bytes = self._num_bytes_read if payload is None else payload.nbytes
        start = time.monotonic()
        round_trip_s = receive_s = float("inf")
        for number in range(NUM_PROBES):
            is_over = number > 0 and time.monotonic() - start > PROBE_BUDGET_S
            is_last = is_over or number == NUM_PROBES - 1
            seconds = await self._round(payload, is_last=is_last)
            if number:
                round_trip_s = min(round_trip_s, seconds[0])
                receive_s = min(receive_s, seconds[1])
            if is_last:
                break
        return PathRates(num_bytes / round_trip_s / 1e9, num_bytes / receive_s / 1e9)

    def on_start(self, message: ProbeStart) -> None:
        self._expected[message.sequence] = message

    def on_read(self, message: ProbeRead, reader: PoolReader | None) -> None:
        """Reads the peer's pool, which it believes to be mapped here."""
        if reader is None or message.num_blocks < 1:
            return
        started = time.perf_counter()
        reader.try_out(
            message.num_blocks,
            lambda: self._send_control(ProbeDone(message.probe_id, time.perf_counter() - started)),
        )

    def on_done(self, message: ProbeDone) -> None:
        answer = self._answers.pop(message.probe_id, None)
        if answer is not None and not answer.done():
            answer.set_result(message.receive_s)

    def take(self, sequence: int, arrival: Arrival) -> bool:
        """True if the data message belongs to a measurement; it's received into scratch memory."""
        start = self._expected.pop(sequence, None)
        if start is None:
            return False
        if arrival.num_bytes > PROBE_BYTES:
            arrival.discard()
            return True
        if self._scratch is None:
            self._scratch = self._allocate(PROBE_BYTES)
        target = self._scratch[: arrival.num_bytes]
        if start.is_last:
            self._scratch = None

        started = time.perf_counter()

        def on_received(error: str | None) -> None:
            if error is None:
                receive_s = time.perf_counter() - started
                self._send_control(ProbeDone(start.probe_id, receive_s))
            else:
                # The peer may still write into it.
                self._scratch = None

        arrival.receive_into(target, on_received)
        return True

    def close(self, reason: str) -> None:
        self._closed = reason
        for answer in self._answers.values():
            if not answer.done():
                answer.set_exception(TransferCancelledError(reason))
        self._answers.clear()
        self._expected.clear()

    async def _round(self, payload: Buffer | None, *, is_last: bool) -> tuple[float, float]:
        """Seconds of the whole round, and those that the receiver needed."""
        if self._closed is not None:
            raise TransferCancelledError(self._closed)
        sequence = self._allocate_sequence()
        answer: asyncio.Future[float] = asyncio.get_running_loop().create_future()
        self._answers[sequence] = answer
        start = time.perf_counter()
        if payload is None:
            self._send_control(ProbeRead(sequence, self._num_blocks_read))
        else:
            self._send_control(ProbeStart(sequence, sequence, is_last))
            self._send_data(payload, sequence, lambda _: None)
        try:
            async with asyncio.timeout(PROBE_TIMEOUT_S):
                receive_s = await answer
        except TimeoutError as error:
            raise TransferTimeoutError("The peer did not answer the path measurement.") from error
        finally:
            self._answers.pop(sequence, None)
        return time.perf_counter() - start, receive_s


def judge_path(
    transport: str, rates: PathRates, ours: HostIdentity, theirs: HostIdentity
) -> PathReport:
    """Compares what was measured with what one thread copies here."""
    memcpy_gb_per_s = measure_memcpy_gb_per_s()
    same_host = is_same_host(ours, theirs)
    is_slow = same_host and rates.receive < SLOW_FRACTION * memcpy_gb_per_s
    warning = None
    if is_slow:
        obstacles = memory_access_obstacles(ours, theirs)
        cause = " and ".join(obstacles) or "UCX_TLS, ptrace restrictions, or no free processor"
        warning = (
            f"KV transfer runs at {rates.receive:.2f} GB/s between two workers on {ours.hostname}, "
            f"where one thread copies {memcpy_gb_per_s:.1f} GB/s, as if over TCP, not "
            f"process memory (CMA) or CUDA IPC; likely cause: {cause}."
        )
    return PathReport(transport, rates.round_trip, memcpy_gb_per_s, same_host, is_slow, warning)
