"""Transport over UCX: RDMA, memory of another process, or TCP, whichever the two processes share.

How one host is made fast *and* safe; found by killing peers in mid-transfer:

- Endpoints always have error handling. Without it UCX aborts the whole process when it reads from
  a dead one ("process_vm_readv … No such process").
- UCX keeps `cma`, which copies between processes, out of such endpoints unless it claims to support
  them (`CMA_MEMORY_INVALIDATE`), and falls silently to TCP. UCX calls the claim provisional; it
  holds here as long as `cma` is used to read, not to write, and reading is what UCX 1.21 chooses
  by itself: a stopped or cut-off sender then can't write late.
- The same claim for shared-memory queues (`POSIX_ERROR_HANDLING`, `SYSV_ERROR_HANDLING`) would be
  false. A receiver has one queue for all its peers, and a sender that dies between taking a place
  in it and filling it blocks it for good, for everyone. So announcements go over TCP, which has a
  connection for each peer, and only the bytes of blocks go past the kernel's network.
- The scheme isn't forced (`RNDV_SCHEME`), because forcing a read makes TCP send whole messages
  unasked. So over other transports a sender may write into a receive that is open; those are
  counted, and `drop_peer` names their tickets.

Device memory turns the second half around. The one fast way between two processes of one host is
that the sender copies (`cuda_ipc`); a read falls to TCP, 0.4 GB/s. So there writing is forced
(DEVICE_MEMORY_SETTINGS), and a sender that was stopped after it had been told the place can
still write there when it goes on, even if UCX has ended the receive with an error meanwhile.
Hence, with `peers_write`, memory of a failed receive is kept and never used again; the agent sees
to it that this is staging memory and no block (kvtransfer/device.py).

A message is looked at before it's received (`tag_probe`), so a receive is only ever posted for a
message that has arrived, and there are no open receives to cancel.
"""

import asyncio
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass

# UCXX sets a variable that UCX builds without CUDA transports then warn about on stdout.
os.environ.setdefault("UCX_WARN_UNUSED_ENV_VARS", "n")

from ucxx import libucxx
from ucxx._lib.arr import Array

from kvtransfer.buffer import Buffer
from kvtransfer.transport import Lane, OnArrival, OnDone
from protocol.errors import TransferError

HOST_MEMORY_SETTINGS: Mapping[str, str] = {
    "CMA_MEMORY_INVALIDATE": "y",
    # Long reads, so that their calls weigh little; and few in one turn of progress, which keeps
    # the event loop for about 1 ms then.
    "CMA_SEG_SIZE": "4m",
    "CMA_TX_QUOTA": "4",
    "RNDV_FRAG_MEM_TYPE": "host",
}

DEVICE_MEMORY_SETTINGS: Mapping[str, str] = {
    "CMA_MEMORY_INVALIDATE": "y",
    "RNDV_SCHEME": "put_zcopy",
}

PROGRESS_BUDGET_S = 0.001
"""Longest time that progress keeps the event loop from others."""

PROGRESS_GUARD_S = 0.001
"""While operations are open, progress is made this often even if UCX's descriptor stays silent;
not every transport reports all that it has to do."""

FINISH_BUDGET_S = 0.02
"""Reading a full window takes less; what takes longer waits for the peer."""

LOOK_AHEAD = 4
"""Operations complete nearly in order, and asking one costs as much as a step of progress."""

_ANY_TAG = libucxx.UCXXTag(0)
_NO_BITS = libucxx.UCXXTagMask(0)


@dataclass(eq=False, slots=True)
class _Operation:
    """A posted request. UCX holds only the pointer, so the buffer's owner is kept here."""

    request: libucxx.UCXRequest
    array: Array
    on_done: OnDone
    lane: "_UcxLane | None"


class UcxTransport:
    """One UCX worker, driven by the event loop through UCX's wake-up descriptor."""

    name = "ucx"

    def __init__(
        self,
        settings: Mapping[str, str] = HOST_MEMORY_SETTINGS,
        *,
        peers_write: bool = False,
        spin_s: float = 0.0,
    ) -> None:
        """With DEVICE_MEMORY_SETTINGS `peers_write` must be set, and the device's context be
        current in this thread. For `spin_s` after each event the loop looks for the next one at
        every turn: where answers come within a fraction of a millisecond, being woken would cost
        more than waiting. Raises TransferError if UCX doesn't start."""
        features = (libucxx.Feature.TAG, libucxx.Feature.WAKEUP)
        try:
            worker = libucxx.UCXWorker(libucxx.UCXContext(dict(settings), features))
            worker.init_blocking_progress_mode()
        except libucxx.UCXError as error:
            raise TransferError(f"UCX did not start: {error}") from error
        self.address: bytes = worker.address.tobytes()
        # None once closed: the worker's descriptors and memory live as long as a reference to it.
        self._worker: libucxx.UCXWorker | None = worker
        self._driver: _Driver | None = None
        self._peers_write = peers_write
        self._spin_s = spin_s

    def start(self, on_arrival: OnArrival) -> None:
        assert self._worker is not None, "closed transports stay closed"
        self._driver = _Driver(
            self._worker, on_arrival, peers_write=self._peers_write, spin_s=self._spin_s
        )

    def connect(self, address: bytes) -> Lane:
        assert self._worker is not None, "the transport is closed"
        assert self._driver is not None, "start() comes first"
        try:
            endpoint = libucxx.UCXEndpoint.create_from_worker_address(
                self._worker,
                libucxx.UCXAddress.create_from_buffer(address),
                endpoint_error_handling=True,
            )
        except libucxx.UCXError as error:
            raise TransferError(f"UCX can't reach the peer: {error}") from error
        return _UcxLane(endpoint, self._driver)

    async def close(self) -> None:
        if self._driver is not None:
            self._driver.stop()
        self._driver = None
        self._worker = None


class _Driver:
    """Makes progress when UCX's descriptor is readable or something was posted."""

    def __init__(
        self,
        worker: libucxx.UCXWorker,
        on_arrival: OnArrival,
        *,
        peers_write: bool,
        spin_s: float,
    ) -> None:
        self.worker = worker
        self._on_arrival = on_arrival
        self._peers_write = peers_write
        self._spin_s = spin_s
        self._spin_until_s = 0.0
        self._kept: list[Array] = []
        """Memory of failed receives that a peer may still write into."""
        self._operations: list[_Operation] = []
        self._loop = asyncio.get_running_loop()
        self._kick: asyncio.Handle | None = None
        self._guard: asyncio.TimerHandle | None = None
        self._descriptor: int = worker.epoll_file_descriptor
        self._loop.add_reader(self._descriptor, self.kick)
        self.kick()

    def kick(self) -> None:
        """Has progress made at the loop's next turn."""
        if self._kick is None:
            self._kick = self._loop.call_soon(self._advance)

    def post(self, operation: _Operation) -> None:
        self._operations.append(operation)
        self.kick()

    def finish_receives(self) -> None:
        """Lets receives end that only need this process to go on reading."""
        deadline = time.perf_counter() + FINISH_BUDGET_S
        while any(operation.lane is None for operation in self._operations):
            self.worker.progress_once()
            self._complete(look_ahead=len(self._operations))
            if time.perf_counter() > deadline:
                return

    def end_lane(self, lane: "_UcxLane") -> None:
        """Ends the lane's open sends with an error; UCX never completes those to a dead peer."""
        ended = [operation for operation in self._operations if operation.lane is lane]
        self._operations = [
            operation for operation in self._operations if operation.lane is not lane
        ]
        for operation in ended:
            operation.on_done("the lane was closed")

    def stop(self) -> None:
        self._loop.remove_reader(self._descriptor)
        for handle in (self._kick, self._guard):
            if handle is not None:
                handle.cancel()
        # What is still open are receives; their memory outlives this process's UCX worker.
        self._operations.clear()

    def _advance(self) -> None:
        self._kick = None
        try:
            is_idle = self._make_progress()
        except BaseException:
            # A callback's error is its owner's; the other transfers must not stand still for it.
            self.kick()
            raise
        is_expecting = self._spin_s > 0 and time.perf_counter() < self._spin_until_s
        if not is_idle or is_expecting or not self.worker.arm():
            self.kick()
        elif self._operations and self._guard is None:
            self._guard = self._loop.call_later(PROGRESS_GUARD_S, self._on_guard)

    def _make_progress(self) -> bool:
        """False if there is more to do after the budget."""
        deadline = time.perf_counter() + PROGRESS_BUDGET_S
        while True:
            # One step at a time: `progress()` goes on as long as any peer keeps it busy.
            advanced = self.worker.progress_once()
            advanced |= self._complete(look_ahead=LOOK_AHEAD)
            advanced |= self._take_arrivals()
            if not advanced and not self._complete(look_ahead=len(self._operations)):
                return True
            now_s = time.perf_counter()
            self._spin_until_s = now_s + self._spin_s
            if now_s > deadline:
                return False

    def _on_guard(self) -> None:
        self._guard = None
        self.kick()

    def _complete(self, *, look_ahead: int) -> bool:
        """Ends completed operations, oldest first, until `look_ahead` others were met."""
        completed: list[_Operation] = []
        still_open: list[_Operation] = []
        for operation in self._operations:
            if operation.request.completed:
                completed.append(operation)
            else:
                still_open.append(operation)
                if len(still_open) > look_ahead:
                    break
        if not completed:
            return False
        num_seen = len(completed) + len(still_open)
        self._operations[:num_seen] = still_open
        for operation in completed:
            error = _error_of(operation.request)
            if error is not None and operation.lane is None and self._peers_write:
                self._kept.append(operation.array)
            operation.on_done(error)
        return True

    def _take_arrivals(self) -> bool:
        any_taken = False
        while (probe := self.worker.tag_probe(_ANY_TAG, _NO_BITS, remove=True)).matched:
            any_taken = True
            self._on_arrival(_UcxArrival(probe, self))
        return any_taken


class _UcxLane:
    def __init__(self, endpoint: libucxx.UCXEndpoint, driver: _Driver) -> None:
        self._endpoint: libucxx.UCXEndpoint | None = endpoint
        self._driver = driver

    def send(self, buffer: Buffer, tag: int, on_done: OnDone) -> None:
        if self._endpoint is None:
            on_done("the lane was closed")
            return
        array = Array(buffer)
        try:
            request = self._endpoint.tag_send(array, libucxx.UCXXTag(tag))
        except libucxx.UCXError as error:
            on_done(_reason(error))
            return
        self._driver.post(_Operation(request, array, on_done, self))

    def close(self) -> None:
        if self._endpoint is None:
            return
        self._driver.finish_receives()
        # With error handling this is a forced close: it neither flushes nor waits for the peer.
        self._endpoint.close_blocking(0, 1)
        self._endpoint = None
        self._driver.end_lane(self)


class _UcxArrival:
    def __init__(self, probe: libucxx.TagProbeResult, driver: _Driver) -> None:
        self._probe = probe
        self._driver = driver
        self.tag: int = probe.sender_tag.value
        self.num_bytes: int = probe.length

    def receive_into(self, buffer: Buffer, on_done: OnDone) -> None:
        # UCX writes as many bytes as the message has, whatever the buffer's size.
        assert buffer.nbytes == self.num_bytes
        array = Array(buffer)
        try:
            request = self._driver.worker.tag_recv_with_handle(array, self._probe)
        except libucxx.UCXError as error:
            on_done(_reason(error))
            return
        self._driver.post(_Operation(request, array, on_done, None))

    def discard(self) -> None:
        self.receive_into(memoryview(bytearray(self.num_bytes)), lambda _: None)


def _error_of(request: libucxx.UCXRequest) -> str | None:
    try:
        request.check_error()
    except libucxx.UCXError as error:
        return _reason(error)
    return None


def _reason(error: libucxx.UCXError) -> str:
    return str(error) or type(error).__name__
