"""One prompt's way from this worker's blocks to a decode worker's.

1. The engine thread starts on the prompt: `ReserveBlocks` asks decode for room.
2. The ticket comes when decode has some. Until then prefill goes on computing; KV waits here.
3. After each chunk the blocks that are full by now are written, while the next chunk computes.
4. The first token is sampled: the last blocks follow, then `PrefillDone`.

A prompt whose first token is its last goes nowhere: without a link, a push only waits for it.
"""

import asyncio
import time

import msgspec

from kvtransfer.connection import Connection
from protocol.ids import RequestKey
from protocol.messages import PrefillDone, ReserveBlocks
from protocol.request import PhaseTimings, SequenceOutput
from protocol.ticket import TransferTicket
from services.prefill.links import DecodeLink
from services.runtime.metrics import WorkerMetrics


class Push:
    """Progress of one prompt and of its transfer; fed by the worker, driven by `run`."""

    def __init__(
        self,
        key: RequestKey,
        num_tokens: int,
        link: DecodeLink | None,
        *,
        block_size: int,
        metrics: WorkerMetrics,
    ) -> None:
        self.key = key
        self.link = link
        self.first: SequenceOutput | None = None
        self._num_tokens = num_tokens
        self._block_size = block_size
        self._metrics = metrics
        self._num_computed_tokens = 0
        self._block_ids: list[int] = []
        self._timings = PhaseTimings()
        self._done_s = 0.0
        self._connection: Connection | None = None
        self._progress = asyncio.Event()
        self._started = asyncio.Event()
        self._ticket: asyncio.Future[TransferTicket] = asyncio.get_running_loop().create_future()

    @property
    def ticket(self) -> TransferTicket | None:
        return self._ticket.result() if self._has_ticket else None

    @property
    def _has_ticket(self) -> bool:
        return self._ticket.done() and not self._ticket.cancelled()

    def chunk_computed(self, num_computed_tokens: int, block_ids: list[int]) -> None:
        self._num_computed_tokens = num_computed_tokens
        self._block_ids = block_ids
        self._started.set()
        self._progress.set()

    def prompt_done(self, first: SequenceOutput, timings: PhaseTimings) -> None:
        self.first = first
        self._timings = timings
        self._done_s = time.monotonic()
        self._progress.set()

    def granted(self, ticket: TransferTicket) -> None:
        if not self._ticket.done():
            self._ticket.set_result(ticket)

    async def run(self) -> None:
        """Returns when decode has everything.

        Raises TransferError, LayoutMismatchError or WorkerLostError.
        """
        link = self.link
        if link is None:
            await self._wait_for_first()
            return
        self._connection = connection = await link.ready()
        await self._started.wait()
        link.peer.send(ReserveBlocks(self.key, self._num_tokens))
        ticket = await self._ticket
        num_writes, transfer_s = await self._write_all(link, connection, ticket)
        assert self.first is not None, "all is written only after the first token"
        exposed_s = time.monotonic() - self._done_s
        self._metrics.observe_exposed_transfer(exposed_s)
        timings = msgspec.structs.replace(
            self._timings, transfer_s=transfer_s, exposed_transfer_s=exposed_s
        )
        link.peer.send(PrefillDone(self.key, ticket.ticket_id, num_writes, self.first, timings))

    async def _wait_for_first(self) -> None:
        while self.first is None:
            self._progress.clear()
            await self._progress.wait()

    async def _write_all(
        self, link: DecodeLink, connection: Connection, ticket: TransferTicket
    ) -> tuple[int, float]:
        """Writes blocks as they become full; returns the number of writes and their seconds."""
        skipped = ticket.num_cached_blocks
        num_sent, num_writes, transfer_s = skipped, 0, 0.0
        while True:
            # Cleared first: what comes in during the write must not be missed.
            self._progress.clear()
            is_last = self.first is not None
            num_ready = (
                len(self._block_ids) if is_last else self._num_computed_tokens // self._block_size
            )
            if num_ready > num_sent:
                started_s = time.monotonic()
                await connection.write(
                    ticket_id=ticket.ticket_id,
                    attempt=self.key.attempt,
                    receiver_incarnation=ticket.incarnation,
                    src_blocks=self._block_ids[num_sent:num_ready],
                    dst_blocks=ticket.block_ids[num_sent - skipped : num_ready - skipped],
                    write_seq=num_writes,
                )
                seconds = time.monotonic() - started_s
                self._metrics.observe_sent(
                    link.ref.worker_id,
                    num_bytes=(num_ready - num_sent) * link.block_bytes,
                    seconds=seconds,
                )
                transfer_s += seconds
                num_sent, num_writes = num_ready, num_writes + 1
            if is_last:
                return num_writes, transfer_s
            await self._progress.wait()

    async def stop(self) -> None:
        """Returns when no write of this prompt is in flight any more. `run` must have ended."""
        if self._connection is not None and self.ticket is not None:
            await self._connection.cancel(self.ticket.ticket_id)
