"""Where a peer reads the sender's pool itself: what it refuses, and what both sides wait for."""

import asyncio
import random
from collections.abc import AsyncIterator
from dataclasses import replace

import msgspec
import pytest
from mapped_region import COPY_S, MappedCopy, MappedPool, MappedRegion
from test_rude_peer import SENDER_INCARNATION, RudePeer
from transfer_cluster import CONFIG, Cluster, Node, push, transport_maker

from kvtransfer.block_ids import BlockIds, pack_block_ids, to_block_ids
from kvtransfer.plan import MAX_BLOCKS_PER_READ
from kvtransfer.tags import MessageKind
from kvtransfer.wire import (
    AgentMessage,
    OfferPool,
    PoolMapped,
    ProbeRead,
    ReadPart,
    WithdrawWrite,
    WriteDone,
    WriteRefused,
    encode,
)

BLOCKS = [4, 5, 6, 7]


def packed(*block_ids: int) -> bytes:
    return pack_block_ids(to_block_ids(block_ids))


@pytest.fixture
async def mapped() -> AsyncIterator[Cluster]:
    cluster = Cluster(transport_maker("local"), MappedRegion)
    yield cluster
    await cluster.close()


@pytest.fixture
async def receiver(mapped: Cluster) -> Node:
    node = mapped.node("d")
    node.agent.expect(1, attempt=0, sender_incarnation=SENDER_INCARNATION, block_ids=BLOCKS)
    return node


@pytest.fixture
async def rude(mapped: Cluster, receiver: Node) -> AsyncIterator[RudePeer]:
    peer = RudePeer(mapped.transport(), receiver)
    await peer.connect()
    yield peer
    await peer.close()


async def ask(rude: RudePeer, message: AgentMessage) -> AgentMessage:
    rude.send(encode(message), MessageKind.CONTROL)
    return await rude.answer()


def part(receiver: Node, src: bytes, dst: bytes) -> ReadPart:
    return ReadPart(1, 1, 0, receiver.incarnation, 0, src, dst, is_last=True)


async def offer(mapped: Cluster, rude: RudePeer) -> None:
    pool = bytearray(b"x" * 256 * (8 << 10))
    exported = MappedRegion(memoryview(pool), num_blocks=256, block_bytes=8 << 10).export()
    assert await ask(rude, OfferPool(exported)) == PoolMapped(is_mapped=True)


async def test_a_pool_of_another_host_is_declined(mapped: Cluster, receiver: Node) -> None:
    peer = RudePeer(mapped.transport(), receiver)
    await peer.connect(boot_id="another")
    pool = bytearray(256 * (8 << 10))
    exported = MappedRegion(memoryview(pool), num_blocks=256, block_bytes=8 << 10).export()
    assert await ask(peer, OfferPool(exported)) == PoolMapped(is_mapped=False)
    await peer.close()


async def test_a_polite_read_works(mapped: Cluster, rude: RudePeer, receiver: Node):
    await offer(mapped, rude)
    ids = packed(*BLOCKS)
    assert await ask(rude, part(receiver, ids, ids)) == WriteDone(1)
    assert receiver.blocks(BLOCKS) == [b"x" * (8 << 10)] * 4


@pytest.mark.parametrize(
    ("src", "dst", "reason"),
    [
        (packed(0), packed(200), "block 200 is not part of ticket 1"),
        (packed(256), packed(4), "outside the sender's pool"),
        (packed(0, 1), packed(4), "2 blocks were announced for 1 places"),
        (b"odd", packed(4), "no list of blocks"),
    ],
)
async def test_reads_that_make_no_sense(
    mapped: Cluster, rude: RudePeer, receiver: Node, src: bytes, dst: bytes, reason: str
):
    await offer(mapped, rude)
    before = bytes(receiver.pool)
    answer = await ask(rude, part(receiver, src, dst))
    assert isinstance(answer, WriteRefused)
    assert reason in answer.reason
    assert bytes(receiver.pool) == before


@pytest.mark.parametrize(
    ("src", "dst", "reason"),
    [
        (packed(0), packed(200), "block 200 is not part of ticket 1"),
        (packed(256), packed(5), "outside the sender's pool"),
        (packed(0, 1), packed(5), "2 blocks were announced for 1 places"),
        (b"odd", packed(5), "no list of blocks"),
    ],
)
async def test_a_later_part_that_makes_no_sense(
    mapped: Cluster, rude: RudePeer, receiver: Node, src: bytes, dst: bytes, reason: str
):
    """Refused once, when the copy that the part before started has ended."""
    await offer(mapped, rude)
    first = msgspec.structs.replace(part(receiver, packed(4), packed(4)), is_last=False)
    rude.send(encode(first), MessageKind.CONTROL)
    started_s = asyncio.get_running_loop().time()
    answer = await ask(rude, part(receiver, src, dst))
    assert isinstance(answer, WriteRefused)
    assert reason in answer.reason
    assert asyncio.get_running_loop().time() - started_s >= COPY_S
    assert receiver.received == []
    await rude.round_trip()
    assert rude.answers.empty()


async def test_a_write_of_several_parts(mapped: Cluster, monkeypatch: pytest.MonkeyPatch):
    num_blocks = 2 * MAX_BLOCKS_PER_READ + 1
    sender, receiver = (mapped.node(n, num_blocks=num_blocks, block_bytes=4) for n in "pd")
    connection = await mapped.connect(sender, receiver)
    parts: list[int] = []
    start_copy = MappedPool.start_copy

    def counted(pool: MappedPool, source_ids: BlockIds, target_ids: BlockIds) -> MappedCopy:
        parts.append(len(source_ids))
        return start_copy(pool, source_ids, target_ids)

    monkeypatch.setattr(MappedPool, "start_copy", counted)
    src, dst = list(range(num_blocks)), list(range(num_blocks))
    random.Random(0).shuffle(src)
    random.Random(1).shuffle(dst)
    receiver.agent.expect(1, attempt=0, sender_incarnation=sender.incarnation, block_ids=dst)
    await push(connection, receiver, src, dst)
    assert parts == [MAX_BLOCKS_PER_READ, MAX_BLOCKS_PER_READ, 1]
    assert [write.num_bytes for write in receiver.received] == [4 * num_blocks]
    sent, arrived = memoryview(sender.pool).cast("I"), memoryview(receiver.pool).cast("I")
    assert [arrived[block_id] for block_id in dst] == [sent[block_id] for block_id in src]


async def test_a_pool_that_was_never_offered(rude: RudePeer, receiver: Node):
    rude.send(encode(ProbeRead(3, 1)), MessageKind.CONTROL)
    rude.send(encode(WithdrawWrite(9)), MessageKind.CONTROL)
    ids = packed(*BLOCKS)
    assert isinstance(await ask(rude, part(receiver, ids, ids)), WriteRefused)


async def test_a_withdrawn_write_is_answered_when_nothing_is_read(
    mapped: Cluster, rude: RudePeer, receiver: Node
):
    await offer(mapped, rude)
    ids = packed(*BLOCKS)
    started_s = asyncio.get_running_loop().time()
    rude.send(encode(part(receiver, ids, ids)), MessageKind.CONTROL)
    answer = await ask(rude, WithdrawWrite(1))
    assert isinstance(answer, WriteRefused)
    assert asyncio.get_running_loop().time() - started_s >= COPY_S
    assert receiver.received == []


async def test_the_receiver_may_decline(mapped: Cluster):
    sender = mapped.node("p")
    receiver = mapped.node("d", config=replace(CONFIG, read_peers_pools=False))
    connection = await mapped.connect(sender, receiver)
    receiver.agent.expect(1, attempt=0, sender_incarnation=sender.incarnation, block_ids=BLOCKS)
    await push(connection, receiver, BLOCKS, BLOCKS[::-1])
    assert receiver.blocks(BLOCKS[::-1]) == sender.blocks(BLOCKS)


async def test_a_path_that_is_read_is_measured_by_reading(mapped: Cluster):
    _, _, connection = await mapped.pair()
    report = await connection.measure()
    assert report.gb_per_s < 256 * (8 << 10) / COPY_S / 1e9
