"""A peer that breaks the protocol is refused or ignored, and harms nobody else."""

import asyncio
from collections.abc import AsyncIterator

import msgspec
import pytest
from transfer_cluster import BLOCK_BYTES, Cluster, Node, push, settle

from kvtransfer.region import Run
from kvtransfer.tags import MessageKind, Tag, new_namespace, pack_tag
from kvtransfer.transport import Arrival, Lane, Transport
from kvtransfer.wire import (
    MAX_CONTROL_BYTES,
    AgentMessage,
    DataMessage,
    ProbeDone,
    ProbeStart,
    WriteDone,
    WritePart,
    WriteRefused,
    decode_message,
    decode_metadata,
    encode,
)

BLOCKS = [4, 5, 6, 7]
SENDER_INCARNATION = 77


class RudePeer:
    """A bare transport that says whatever the test wants, and records the answers."""

    def __init__(self, transport: Transport, receiver: Node) -> None:
        self._transport = transport
        self._receiver = receiver
        self._namespace = new_namespace()
        self._lane: Lane | None = None
        self.answers: asyncio.Queue[AgentMessage] = asyncio.Queue()

    async def connect(self, *, boot_id: str | None = None) -> None:
        """As a process of the receiver's host, or of the one that booted as `boot_id`."""
        self._transport.start(self._on_arrival)
        theirs = decode_metadata(self._receiver.agent.metadata())
        host = theirs.host
        if boot_id is not None:
            host = msgspec.structs.replace(host, boot_id=boot_id)
        ours = msgspec.structs.replace(
            theirs,
            worker_id="rude",
            incarnation=SENDER_INCARNATION,
            tag_namespace=self._namespace,
            address=self._transport.address,
            host=host,
        )
        await self._receiver.agent.connect(bytes(encode(ours)))
        self._lane = self._transport.connect(theirs.address)

    def send(self, data: bytes | bytearray, kind: MessageKind, sequence: int = 0) -> None:
        assert self._lane is not None
        tag = pack_tag(Tag(self._namespace, kind, sequence))
        self._lane.send(memoryview(bytearray(data)), tag, lambda _: None)

    def announce(self, messages: list[DataMessage], *, is_last: bool = True) -> None:
        part = WritePart(1, 1, 0, self._receiver.incarnation, 0, 10, messages, is_last)
        self.send(encode(part), MessageKind.CONTROL)

    async def round_trip(self) -> None:
        """Until the receiver has read what was sent before."""
        self.send(encode(ProbeStart(5, 5, is_last=True)), MessageKind.CONTROL)
        self.send(b"probe", MessageKind.DATA, 5)
        assert isinstance(await self.answer(), ProbeDone)

    async def answer(self) -> AgentMessage:
        async with asyncio.timeout(5):
            return await self.answers.get()

    async def close(self) -> None:
        if self._lane is not None:
            self._lane.close()
        await self._transport.close()

    def _on_arrival(self, arrival: Arrival) -> None:
        buffer = bytearray(arrival.num_bytes)
        arrival.receive_into(
            memoryview(buffer), lambda _: self.answers.put_nowait(decode_message(buffer))
        )


@pytest.fixture
async def receiver(cluster: Cluster) -> Node:
    node = cluster.node("d")
    node.agent.expect(1, attempt=0, sender_incarnation=SENDER_INCARNATION, block_ids=BLOCKS)
    return node


@pytest.fixture
async def rude(cluster: Cluster, receiver: Node) -> AsyncIterator[RudePeer]:
    peer = RudePeer(cluster.transport(), receiver)
    await peer.connect()
    yield peer
    await peer.close()


async def test_a_polite_write_works(rude: RudePeer, receiver: Node):
    rude.announce([DataMessage([(4, 2), (6, 2)])])
    rude.send(b"x" * 4 * BLOCK_BYTES, MessageKind.DATA, 10)
    assert await rude.answer() == WriteDone(1)
    assert receiver.blocks(BLOCKS) == [b"x" * BLOCK_BYTES] * 4


@pytest.mark.parametrize("num_bytes", [1, 3 * BLOCK_BYTES, 5 * BLOCK_BYTES])
async def test_data_of_the_wrong_size(rude: RudePeer, receiver: Node, num_bytes: int):
    before = bytes(receiver.pool)
    rude.announce([DataMessage([(4, 4)])])
    rude.send(b"x" * num_bytes, MessageKind.DATA, 10)
    answer = await rude.answer()
    assert isinstance(answer, WriteRefused)
    assert f"{num_bytes} bytes came where {4 * BLOCK_BYTES} were announced" in answer.reason
    assert bytes(receiver.pool) == before


async def test_data_that_nobody_announced(rude: RudePeer, receiver: Node):
    before = bytes(receiver.pool)
    rude.send(b"x" * 4 * BLOCK_BYTES, MessageKind.DATA, 3)
    rude.announce([])
    assert await rude.answer() == WriteDone(1)
    assert bytes(receiver.pool) == before


async def test_data_after_the_ticket_was_closed(rude: RudePeer, receiver: Node):
    rude.announce([DataMessage([(4, 2)]), DataMessage([(6, 2)])])
    rude.send(b"x" * 2 * BLOCK_BYTES, MessageKind.DATA, 10)
    await rude.round_trip()
    await receiver.agent.close_ticket(1)
    after = bytes(receiver.pool)
    rude.send(b"y" * 2 * BLOCK_BYTES, MessageKind.DATA, 11)
    answer = await rude.answer()
    assert isinstance(answer, WriteRefused)
    rude.announce([])
    assert isinstance(await rude.answer(), WriteRefused)
    assert bytes(receiver.pool) == after
    assert receiver.received == []


@pytest.mark.parametrize(
    "runs", [[], [(4, 2), (200, 1)], [(-1, 1)], [(4, -2), (4, 2)], [(4, 0)], [(4, 2**60)]]
)
async def test_announcements_that_make_no_sense(rude: RudePeer, runs: list[Run]):
    rude.announce([DataMessage(runs)])
    assert isinstance(await rude.answer(), WriteRefused)


async def test_garbage_leaves_the_others_alone(cluster: Cluster, rude: RudePeer, receiver: Node):
    rude.send(b"\xc1garbage", MessageKind.CONTROL)
    rude.send(b"\x92\xa4d\xffne\x01", MessageKind.CONTROL)
    rude.send(b"z" * (MAX_CONTROL_BYTES + 1), MessageKind.CONTROL)
    sender = cluster.node("p")
    connection = await cluster.connect(sender, receiver)
    receiver.agent.expect(2, attempt=0, sender_incarnation=sender.incarnation, block_ids=[0, 1])
    await push(connection, receiver, [0, 1], [0, 1], ticket_id=2)
    await settle(connection)
    assert receiver.blocks([0, 1]) == sender.blocks([0, 1])
    rude.announce([])
    assert await rude.answer() == WriteDone(1)


async def test_a_message_without_a_known_namespace(cluster: Cluster, receiver: Node):
    stranger = cluster.transport()
    arrived: list[Arrival] = []
    stranger.start(arrived.append)
    lane = stranger.connect(decode_metadata(receiver.agent.metadata()).address)
    done = asyncio.Event()
    tag = pack_tag(Tag(new_namespace(), MessageKind.DATA, 1))
    lane.send(memoryview(bytearray(100_000)), tag, lambda _: done.set())
    async with asyncio.timeout(5):
        await done.wait()
    lane.close()
    await stranger.close()
    assert arrived == []
