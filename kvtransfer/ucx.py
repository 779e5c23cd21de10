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

import os
from collections.abc import Mapping

# UCXX sets a variable that UCX builds without CUDA transports then warn about on stdout.
os.environ.setdefault("UCX_WARN_UNUSED_ENV_VARS", "n")

from ucxx import libucxx

from kvtransfer.transport import Lane, OnArrival
from kvtransfer.ucx_driver import Driver
from kvtransfer.ucx_messages import UcxArrival, UcxLane
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
    # Eagerly go what blocks to read are announced in (wire.MAX_CONTROL_BYTES), and small blocks.
    "RNDV_THRESH": "40k",
}


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
        self._driver: Driver | None = None
        self._peers_write = peers_write
        self._spin_s = spin_s

    def start(self, on_arrival: OnArrival) -> None:
        assert self._worker is not None, "closed transports stay closed"

        def on_probe(probe: libucxx.TagProbeResult) -> None:
            on_arrival(UcxArrival(probe, driver))

        driver = Driver(self._worker, on_probe, peers_write=self._peers_write, spin_s=self._spin_s)
        self._driver = driver

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
        return UcxLane(endpoint, self._driver)

    async def close(self) -> None:
        if self._driver is not None:
            self._driver.stop()
        self._driver = None
        self._worker = None
