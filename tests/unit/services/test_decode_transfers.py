"""Incoming transfers: both orders of arrival, and blocks that return only when nobody can write."""

import asyncio

import pytest

from kvtransfer.agent import TransferAgent
from kvtransfer.incoming_write import WriteReceived
from kvtransfer.local import LocalFabric, LocalTransport
from kvtransfer.region import KVRegion
from protocol.ids import RequestKey, WorkerRef
from protocol.messages import (
    CancelTransfer,
    ControlMessage,
    GrantTicket,
    PrefillDone,
    PrefillFailed,
    ReserveBlocks,
    TransferStopped,
)
from protocol.request import PhaseTimings, Request, SequenceOutput
from protocol.sampling import SamplingParams
from services.decode.loop import (
    AdmitTransferred,
    Command,
    DropTransfer,
    EndQuarantine,
    MakeRoom,
    RoomMade,
)
from services.decode.transfers import IncomingTransfers
from services.runtime.peers import Peer
from services.runtime.tasks import TaskOwner

KEY = RequestKey("r", 0)
REQUEST = Request(
    key=KEY, token_ids=[1] * 40, num_prompt_tokens=40, sampling=SamplingParams(max_tokens=4)
)
PREFILL = WorkerRef("prefill-0", 7, "tcp://127.0.0.1:1")
ROOM = RoomMade(KEY, 1, [4, 5])
RESERVE = ReserveBlocks(KEY, 40)


def first(*, ends: bool = False) -> SequenceOutput:
    return SequenceOutput(
        key=KEY, position=0, token_ids=[9], finish_reason="length" if ends else None
    )


class Scene:
    """A decode worker's transfers, what they post to the engine and what they send."""

    def __init__(self, ticket_ttl_s: float = 60.0) -> None:
        self.posted: list[Command] = []
        self.given_back: list[str] = []
        self.sent: list[ControlMessage] = []
        self.sender = Peer(PREFILL.worker_id, PREFILL.incarnation, link=self)
        region = KVRegion(memoryview(bytearray(8 * 16)), num_blocks=8, block_bytes=16)
        agent = TransferAgent(
            LocalTransport(LocalFabric()),
            region,
            worker_id="decode-0",
            incarnation=3,
            on_write=lambda _: None,
        )
        self.tasks = TaskOwner(on_failure=lambda error: pytest.fail(str(error)))
        self.transfers = IncomingTransfers(
            incarnation=3,
            agent=agent,
            tasks=self.tasks,
            post=self.posted.append,
            give_back=lambda _, message: self.given_back.append(message),
            ticket_ttl_s=ticket_ttl_s,
        )

    def transmit(self, peer: Peer, message: ControlMessage) -> None:
        assert peer is self.sender
        self.sent.append(message)

    def receive(self) -> int:
        """Goes on until the ticket is out; returns its id."""
        self.transfers.expect(REQUEST, PREFILL)
        self.transfers.reserve(self.sender, RESERVE)
        self.transfers.grant(ROOM)
        grant = self.sent.pop()
        assert isinstance(grant, GrantTicket)
        assert grant.ticket.block_ids == ROOM.block_ids
        self.posted.clear()
        return grant.ticket.ticket_id

    def write(self, ticket_id: int, sequence: int) -> None:
        self.transfers.write_received(WriteReceived(ticket_id, sequence, "prefill-0", 16, 0.1))

    async def settle(self) -> None:
        """Lets the tasks that close tickets end."""
        for _ in range(5):
            await asyncio.sleep(0)


@pytest.fixture
async def scene() -> Scene:
    return Scene()


@pytest.mark.parametrize("first_word", ["router's", "prefill's"])
async def test_both_words_in_either_order_ask_for_room_once(scene: Scene, first_word: str) -> None:
    steps = [
        lambda: scene.transfers.expect(REQUEST, PREFILL),
        lambda: scene.transfers.reserve(scene.sender, RESERVE),
    ]
    for step in steps if first_word == "router's" else reversed(steps):
        assert scene.posted == []
        step()
    assert scene.posted == [MakeRoom(REQUEST)]


async def test_admitted_after_the_last_write_and_prefills_word_in_either_order(
    scene: Scene,
) -> None:
    ticket_id = scene.receive()
    timings = PhaseTimings(prefill_s=1.0)
    scene.write(ticket_id, 0)
    scene.transfers.prefill_done(PrefillDone(KEY, ticket_id, 2, first(), timings))
    assert scene.posted == []
    scene.write(ticket_id, 1)
    assert scene.posted == [AdmitTransferred(KEY, first(), timings)]
    assert len(scene.transfers) == 0


async def test_given_up_before_there_was_room_nothing_can_be_written(scene: Scene) -> None:
    scene.transfers.expect(REQUEST, PREFILL)
    scene.transfers.reserve(scene.sender, RESERVE)
    scene.transfers.abort(KEY)
    assert scene.posted[1:] == [DropTransfer(KEY), EndQuarantine(KEY)]
    assert scene.sent == [CancelTransfer(KEY, None)]
    # The engine had given room at the same moment: it was dropped by the command on its way.
    scene.transfers.grant(ROOM)
    assert scene.sent == [CancelTransfer(KEY, None)]


async def test_blocks_stay_in_quarantine_until_the_sender_has_stopped(scene: Scene) -> None:
    ticket_id = scene.receive()
    scene.transfers.abort(KEY)
    await scene.settle()
    assert scene.posted == [DropTransfer(KEY)]
    assert scene.sent == [CancelTransfer(KEY, ticket_id)]
    scene.transfers.transfer_stopped(TransferStopped(KEY, ticket_id))
    assert scene.posted == [DropTransfer(KEY), EndQuarantine(KEY)]
    assert len(scene.transfers) == 0


async def test_a_dead_sender_ends_quarantine_and_the_router_is_told(scene: Scene) -> None:
    scene.receive()
    scene.transfers.sender_lost(scene.sender)
    await scene.settle()
    assert scene.posted == [DropTransfer(KEY), EndQuarantine(KEY)]
    assert scene.given_back == ["prefill worker prefill-0 was lost"]


async def test_another_incarnations_death_changes_nothing(scene: Scene) -> None:
    scene.receive()
    scene.transfers.sender_lost(Peer(PREFILL.worker_id, 6, link=scene))
    await scene.settle()
    assert scene.posted == []
    assert KEY in scene.transfers


async def test_prefills_failure_frees_without_asking_it(scene: Scene) -> None:
    scene.receive()
    scene.transfers.prefill_failed(PrefillFailed(KEY, "no reason"))
    await scene.settle()
    assert scene.posted == [DropTransfer(KEY), EndQuarantine(KEY)]
    assert scene.sent == []
    assert scene.given_back == []


async def test_a_first_token_that_is_the_last_frees_the_reservation(scene: Scene) -> None:
    ticket_id = scene.receive()
    done = PrefillDone(KEY, ticket_id, 1, first(ends=True), PhaseTimings())
    scene.transfers.prefill_done(done)
    await scene.settle()
    assert scene.posted == [DropTransfer(KEY), EndQuarantine(KEY)]


async def test_silence_ends_the_lease_and_a_write_renews_it() -> None:
    scene = Scene(ticket_ttl_s=0.0)
    ticket_id = scene.receive()
    scene.transfers.end_leases()
    assert scene.posted == [DropTransfer(KEY)]
    assert scene.given_back == ["prefill stopped sending before the request was done"]
    assert scene.sent == [CancelTransfer(KEY, ticket_id)]

    patient = Scene(ticket_ttl_s=60.0)
    ticket_id = patient.receive()
    patient.write(ticket_id, 0)
    patient.transfers.renew([ticket_id, 999])
    patient.transfers.end_leases()
    assert patient.posted == []


async def test_a_stranger_gets_no_ticket(scene: Scene) -> None:
    scene.transfers.expect(REQUEST, PREFILL)
    stranger = Peer(PREFILL.worker_id, 8, link=scene)
    scene.sender = stranger
    scene.transfers.reserve(stranger, RESERVE)
    assert scene.sent == [CancelTransfer(KEY, None)]
    assert scene.posted == []
