"""Messages over UCX: the lane that they leave on, and how they arrive."""

from ucxx import libucxx
from ucxx._lib.arr import Array

from kvtransfer.buffer import Buffer
from kvtransfer.transport import OnDone
from kvtransfer.ucx_driver import Driver, Operation, reason_of


class UcxLane:
    def __init__(self, endpoint: libucxx.UCXEndpoint, driver: Driver) -> None:
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
            on_done(reason_of(error))
            return
        self._driver.post(Operation(request, array, on_done, self))

    def close(self) -> None:
        if self._endpoint is None:
            return
        self._driver.finish_receives()
        # With error handling this is a forced close: it neither flushes nor waits for the peer.
        self._endpoint.close_blocking(0, 1)
        self._endpoint = None
        self._driver.end_lane(self)


class UcxArrival:
    def __init__(self, probe: libucxx.TagProbeResult, driver: Driver) -> None:
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
            on_done(reason_of(error))
            return
        self._driver.post(Operation(request, array, on_done, None))

    def discard(self) -> None:
        self.receive_into(memoryview(bytearray(self.num_bytes)), lambda _: None)
