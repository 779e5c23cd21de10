"""All transfers that come to this decode worker, from the first word about them to their end.

 1. `ExpectRequest` from the router and `ReserveBlocks` from prefill meet, in either order.
 2. The engine thread is asked for room; when there is some, the transfer agent is told to expect
    writes to exactly these blocks, and prefill gets its ticket.
 3. Writes arrive; each renews the ticket's lease.
 4. `PrefillDone` and the last write: the engine thread admits the sequence.

Whatever goes wrong before 4 (abort, lost router, lost or failed prefill, lease over) gives the
transfer up: no further write is accepted, prefill is told to stop, and the blocks stay in
quarantine until the agent has no receive in flight and prefill has confirmed or is dead.
"""

import itertools
import logging
import time
from collections.abc import Callable

from kvtransfer.agent import TransferAgent
from kvtransfer.incoming_write import WriteReceived
from protocol.ids import Incarnation, RequestKey, TicketId, WorkerRef
from protocol.messages import (
    CancelTransfer,
    GrantTicket,
    PrefillDone,
    PrefillFailed,
    ReserveBlocks,
    TransferStopped,
)
from protocol.request import Request
from protocol.ticket import TransferTicket
from services.decode.incoming import Event, Incoming, Phase
from services.decode.loop import (
    AdmitTransferred,
    Command,
    DropTransfer,
    EndQuarantine,
    MakeRoom,
    RoomMade,
)
from services.runtime.peers import Peer
from services.runtime.tasks import TaskOwner

logger = logging.getLogger(__name__)

# How long prefill's word waits for the router's: they leave the router at the same moment.
ANNOUNCED_TTL_S = 5.0


class IncomingTransfers:
    """`post` reaches the engine thread; `give_back` tells the router that a request failed."""

    def __init__(
        self,
        *,
        incarnation: Incarnation,
        agent: TransferAgent,
        tasks: TaskOwner,
        post: Callable[[Command], None],
        give_back: Callable[[RequestKey, str], None],
        ticket_ttl_s: float,
    ) -> None:
        self._incarnation = incarnation
        self._agent = agent
        self._tasks = tasks
        self._post = post
        self._give_back = give_back
        self._ticket_ttl_s = ticket_ttl_s
        self._incoming: dict[RequestKey, Incoming] = {}
        self._by_ticket: dict[TicketId, Incoming] = {}
        self._ticket_ids = itertools.count(1)

    def __len__(self) -> int:
        return len(self._incoming)

    def __contains__(self, key: RequestKey) -> bool:
        return key in self._incoming

    def expect(self, request: Request, prefill: WorkerRef) -> None:
        """The router has placed the request on `prefill` and here."""
        incoming = self._incoming.get(request.key)
        if incoming is None:
            self._incoming[request.key] = Incoming(
                request.key, prefill.worker_id, prefill.incarnation, Phase.EXPECTED, request
            )
            return
        if incoming.phase is not Phase.ANNOUNCED:
            logger.warning("request %s came twice; the second is ignored", request.key)
            return
        incoming.request = request
        incoming.deadline_s = None
        self._ask_for_room(incoming, Event.REQUEST_CAME)

    def reserve(self, sender: Peer, message: ReserveBlocks) -> None:
        """Prefill has started on the request and wants a ticket."""
        incoming = self._incoming.get(message.key)
        if incoming is None:
            incoming = Incoming(message.key, sender.peer_id, sender.incarnation, Phase.ANNOUNCED)
            incoming.sender = sender
            incoming.deadline_s = time.monotonic() + ANNOUNCED_TTL_S
            self._incoming[message.key] = incoming
            return
        is_its_prefill = (incoming.worker_id, incoming.incarnation) == (
            sender.peer_id,
            sender.incarnation,
        )
        if not is_its_prefill or incoming.phase is not Phase.EXPECTED:
            sender.send(CancelTransfer(message.key, None))
            return
        incoming.sender = sender
        self._ask_for_room(incoming, Event.ROOM_ASKED)

    def grant(self, room: RoomMade) -> None:
        """The engine thread has reserved blocks."""
        incoming = self._incoming.get(room.key)
        if incoming is None or incoming.phase is not Phase.WAITING:
            return  # given up meanwhile: `DropTransfer` is on its way to the engine thread
        assert incoming.sender is not None, "it has asked for the room"
        incoming.advance(Event.ROOM_GIVEN)
        ticket = TransferTicket(
            ticket_id=next(self._ticket_ids),
            key=room.key,
            incarnation=self._incarnation,
            num_cached_blocks=room.num_cached_blocks,
            block_ids=room.block_ids,
            ttl_s=self._ticket_ttl_s,
        )
        incoming.ticket = ticket
        incoming.deadline_s = time.monotonic() + self._ticket_ttl_s
        self._by_ticket[ticket.ticket_id] = incoming
        self._agent.expect(
            ticket.ticket_id,
            attempt=room.key.attempt,
            sender_incarnation=incoming.incarnation,
            block_ids=room.block_ids,
        )
        incoming.sender.send(GrantTicket(ticket))

    def write_received(self, write: WriteReceived) -> None:
        incoming = self._by_ticket.get(write.ticket_id)
        if incoming is None or incoming.phase is not Phase.RECEIVING:
            return
        incoming.num_writes_received += 1
        incoming.deadline_s = time.monotonic() + self._ticket_ttl_s
        self._admit_if_complete(incoming)

    def renew(self, ticket_ids: list[TicketId]) -> None:
        for ticket_id in ticket_ids:
            incoming = self._by_ticket.get(ticket_id)
            if incoming is not None:
                incoming.deadline_s = time.monotonic() + self._ticket_ttl_s

    def prefill_done(self, message: PrefillDone) -> None:
        incoming = self._incoming.get(message.key)
        if incoming is None or incoming.phase is Phase.STOPPING:
            return
        if message.first.finish_reason is not None:
            # The first token was the last: the router has it, nothing is left to do here.
            self._give_up(incoming, sender_stopped=True)
        elif incoming.phase is Phase.RECEIVING:
            incoming.done = message
            self._admit_if_complete(incoming)

    def prefill_failed(self, message: PrefillFailed) -> None:
        """Prefill has told the router itself."""
        incoming = self._incoming.get(message.key)
        if incoming is not None:
            self._give_up(incoming, sender_stopped=True)

    def refused(self, key: RequestKey) -> None:
        """The engine can't ever run it. The router, which is told, also tells prefill to stop."""
        incoming = self._incoming.get(key)
        if incoming is not None:
            self._give_up(incoming, sender_stopped=False)

    def abort(self, key: RequestKey) -> None:
        incoming = self._incoming.get(key)
        if incoming is not None:
            self._give_up(incoming, sender_stopped=False)

    def transfer_stopped(self, message: TransferStopped) -> None:
        incoming = self._by_ticket.get(message.ticket_id)
        if incoming is not None and incoming.phase is Phase.STOPPING:
            incoming.sender_stopped = True
            self._end_if_stopped(incoming)

    def sender_lost(self, sender: Peer) -> None:
        """A dead process writes nothing more, once the agent has dropped its connection."""
        lost = [
            incoming
            for incoming in self._incoming.values()
            if (incoming.worker_id, incoming.incarnation) == (sender.peer_id, sender.incarnation)
        ]
        for incoming in lost:
            if incoming.phase is not Phase.STOPPING:
                self._give_back(incoming.key, f"prefill worker {sender.peer_id} was lost")
            self._give_up(incoming, sender_stopped=True)

    def end_leases(self) -> None:
        """Gives up what has been silent for too long. Called a few times a second."""
        now_s = time.monotonic()
        for incoming in list(self._incoming.values()):
            if incoming.deadline_s is None or now_s < incoming.deadline_s:
                continue
            if incoming.phase is Phase.RECEIVING:
                self._give_back(incoming.key, "prefill stopped sending before the request was done")
            if incoming.phase is not Phase.STOPPING:
                self._give_up(incoming, sender_stopped=False)

    def _ask_for_room(self, incoming: Incoming, event: Event) -> None:
        assert incoming.request is not None, "both sides have spoken"
        incoming.advance(event)
        self._post(MakeRoom(incoming.request))

    def _admit_if_complete(self, incoming: Incoming) -> None:
        if incoming.done is None or incoming.num_writes_received < incoming.done.num_writes:
            return
        incoming.advance(Event.ALL_RECEIVED)
        self._forget(incoming)
        assert incoming.ticket is not None, "it was receiving"
        self._tasks.start(self._agent.close_ticket(incoming.ticket.ticket_id))
        self._post(AdmitTransferred(incoming.key, incoming.done.first, incoming.done.timings))

    def _give_up(self, incoming: Incoming, *, sender_stopped: bool) -> None:
        incoming.sender_stopped |= sender_stopped
        if incoming.phase is Phase.STOPPING:
            self._end_if_stopped(incoming)
            return
        had_asked = incoming.phase in (Phase.WAITING, Phase.RECEIVING)
        incoming.advance(Event.GIVEN_UP)
        if had_asked:
            self._post(DropTransfer(incoming.key))
        ticket_id = None if incoming.ticket is None else incoming.ticket.ticket_id
        if incoming.sender is not None and not incoming.sender_stopped:
            incoming.sender.send(CancelTransfer(incoming.key, ticket_id))
        if ticket_id is None:
            # No ticket went out, so nobody can be writing.
            if had_asked:
                self._post(EndQuarantine(incoming.key))
            self._forget(incoming)
        else:
            self._tasks.start(self._close(incoming, ticket_id))

    async def _close(self, incoming: Incoming, ticket_id: TicketId) -> None:
        await self._agent.close_ticket(ticket_id)
        incoming.receives_stopped = True
        self._end_if_stopped(incoming)

    def _end_if_stopped(self, incoming: Incoming) -> None:
        if incoming.phase is Phase.STOPPING and (
            incoming.sender_stopped and incoming.receives_stopped
        ):
            incoming.advance(Event.WRITES_STOPPED)
            self._post(EndQuarantine(incoming.key))
            self._forget(incoming)

    def _forget(self, incoming: Incoming) -> None:
        del self._incoming[incoming.key]
        if incoming.ticket is not None:
            del self._by_ticket[incoming.ticket.ticket_id]
