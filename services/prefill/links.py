"""Connections to decode workers: the control channel's, and the transfer agent's on top of it.

1. The first prompt for a decode worker (or its discovery) opens the control connection.
2. `ConnectKV` tells it our KV layout and transfer address; `KVConnected` brings its own, or the
   reason why the two can't exchange blocks.
3. The agent connects and measures the path once; a slow fallback is warned of.
4. The link is ready until the control connection is lost.
"""

import asyncio
import logging

from kvtransfer.agent import TransferAgent
from kvtransfer.connection import Connection
from protocol.errors import LayoutMismatchError, TransferError, WorkerLostError
from protocol.ids import Incarnation, WorkerId, WorkerRef
from protocol.layout import KVLayout
from protocol.messages import ConnectKV, KVConnected
from services.runtime.channel import ControlChannel
from services.runtime.peers import Peer
from services.runtime.tasks import TaskOwner

logger = logging.getLogger(__name__)

CONNECT_TIMEOUT_S = 10.0


class DecodeLink:
    """The way to one incarnation of one decode worker; made by `DecodeLinks`."""

    def __init__(self, ref: WorkerRef, peer: Peer, *, block_bytes: int) -> None:
        self.ref = ref
        self.peer = peer
        self.block_bytes = block_bytes
        self.gb_per_s: float | None = None
        loop = asyncio.get_running_loop()
        self.answer: asyncio.Future[KVConnected] = loop.create_future()
        self.connection: asyncio.Future[Connection] = loop.create_future()
        # Nobody may be waiting when it fails; the failure is logged where it happens.
        self.connection.add_done_callback(lambda done: done.cancelled() or done.exception())

    async def ready(self) -> Connection:
        """Raises TransferError, LayoutMismatchError or WorkerLostError."""
        return await asyncio.shield(self.connection)


class DecodeLinks:
    """All links of this prefill worker, by decode worker and incarnation."""

    def __init__(
        self,
        *,
        ours: WorkerRef,
        layout: KVLayout,
        channel: ControlChannel,
        agent: TransferAgent,
        tasks: TaskOwner,
    ) -> None:
        self._ours = ours
        self._layout = layout
        self._channel = channel
        self._agent = agent
        self._tasks = tasks
        self._links: dict[tuple[WorkerId, Incarnation], DecodeLink] = {}

    def to(self, ref: WorkerRef) -> DecodeLink:
        """The link to this decode worker, opened if there is none."""
        key = (ref.worker_id, ref.incarnation)
        link = self._links.get(key)
        if link is None:
            link = DecodeLink(ref, self._channel.connect(ref), block_bytes=self._layout.block_bytes)
            self._links[key] = link
            self._tasks.start(self._open(link))
        return link

    def answered(self, peer: Peer, message: KVConnected) -> None:
        link = self._links.get((peer.peer_id, peer.incarnation))
        if link is not None and not link.answer.done():
            link.answer.set_result(message)

    def lost(self, peer: Peer, why: str) -> None:
        """Forgets the link; whoever waits for it gets WorkerLostError."""
        link = self._links.pop((peer.peer_id, peer.incarnation), None)
        if link is not None:
            self._agent.drop_peer(peer.peer_id, peer.incarnation)
            _fail(link, WorkerLostError(f"decode worker {peer.peer_id} was lost ({why})"))

    def rates_gb_per_s(self) -> dict[WorkerId, float]:
        """Measured transfer rate to each decode worker that has a ready link."""
        return {
            link.ref.worker_id: link.gb_per_s
            for link in self._links.values()
            if link.gb_per_s is not None
        }

    async def _open(self, link: DecodeLink) -> None:
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                link.peer.send(ConnectKV(self._ours, self._layout, self._agent.metadata()))
                answer = await link.answer
                if answer.error is not None:
                    raise LayoutMismatchError(answer.error)
                connection = await self._agent.connect(answer.agent)
                report = await connection.measure()
        except (TransferError, LayoutMismatchError) as error:
            self._give_up(link, error)
        except TimeoutError:
            self._give_up(
                link,
                TransferError(
                    f"no KV connection to {link.ref.worker_id} within {CONNECT_TIMEOUT_S:g} s"
                ),
            )
        else:
            link.gb_per_s = report.gb_per_s
            if report.warning is not None:
                logger.warning("KV path to %s: %s", link.ref.worker_id, report.warning)
            if not link.connection.done():
                link.connection.set_result(connection)

    def _give_up(self, link: DecodeLink, error: Exception) -> None:
        logger.error("no KV path to %s: %s", link.ref.worker_id, error)
        _fail(link, error)
        # The next prompt for it tries anew.
        self._links.pop((link.ref.worker_id, link.ref.incarnation), None)


def _fail(link: DecodeLink, error: Exception) -> None:
    if not link.answer.done():
        link.answer.cancel()
    if not link.connection.done():
        link.connection.set_exception(error)
