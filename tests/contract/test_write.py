"""Blocks arrive unchanged, exactly where they should, and are announced once, after the data."""

import asyncio
import random

import pytest
from transfer_cluster import BLOCK_BYTES, NUM_BLOCKS, Cluster, push


def scattered(seed: int, count: int) -> list[int]:
    return random.Random(seed).sample(range(NUM_BLOCKS), count)


PLACES = {
    "one block": ([3], [200]),
    "one run": (list(range(10, 100)), list(range(150, 240))),
    "scattered": (scattered(1, 100), scattered(2, 100)),
    "scattered source": (scattered(3, 60), list(range(60))),
    "scattered target": (list(range(60)), scattered(4, 60)),
    "short and long runs": (
        [5, *range(20, 90), 7, 8, *range(100, 103)],
        [250, *range(70), 100, 101, *range(200, 203)],
    ),
    "whole pool backwards": (list(range(NUM_BLOCKS)), list(range(NUM_BLOCKS))[::-1]),
}


@pytest.mark.parametrize("place", PLACES)
async def test_blocks_arrive_where_they_should_and_nowhere_else(cluster: Cluster, place: str):
    src, dst = PLACES[place]
    sender, receiver, connection = await cluster.pair()
    untouched = {b: receiver.block(b) for b in range(NUM_BLOCKS) if b not in dst}
    receiver.agent.expect(1, attempt=0, sender_incarnation=sender.incarnation, block_ids=dst)

    await push(connection, receiver, src, dst)

    assert receiver.blocks(dst) == sender.blocks(src)
    assert {b: receiver.block(b) for b in untouched} == untouched
    [received] = receiver.received
    assert (received.ticket_id, received.write_seq, received.sender) == (1, 0, "p")
    assert received.num_bytes == len(src) * BLOCK_BYTES


async def test_a_write_without_blocks_is_a_notification(cluster: Cluster):
    sender, receiver, connection = await cluster.pair()
    receiver.agent.expect(1, attempt=0, sender_incarnation=sender.incarnation, block_ids=[])
    await push(connection, receiver, [], [], write_seq=9)
    assert [w.write_seq for w in receiver.received] == [9]


async def test_notification_comes_when_the_data_is_in_place(cluster: Cluster):
    sender, receiver, connection = await cluster.pair()
    src, dst = scattered(5, 80), scattered(6, 80)
    seen: list[bool] = []
    receiver.on_write = lambda _: seen.append(receiver.blocks(dst) == sender.blocks(src))
    receiver.agent.expect(1, attempt=0, sender_incarnation=sender.incarnation, block_ids=dst)
    await push(connection, receiver, src, dst)
    assert seen == [True]


async def test_writes_of_one_ticket_keep_their_numbers(cluster: Cluster):
    sender, receiver, connection = await cluster.pair()
    blocks = list(range(64))
    receiver.agent.expect(1, attempt=0, sender_incarnation=sender.incarnation, block_ids=blocks)
    for write_seq in range(8):
        chunk = blocks[write_seq * 8 : write_seq * 8 + 8]
        await push(connection, receiver, chunk, chunk, write_seq=write_seq)
    assert [w.write_seq for w in receiver.received] == list(range(8))
    assert receiver.blocks(blocks) == sender.blocks(blocks)


async def test_concurrent_writes_of_one_connection(cluster: Cluster):
    sender, receiver, connection = await cluster.pair()
    places = random.Random(7).sample(range(NUM_BLOCKS), 240)
    chunks = [places[at : at + 30] for at in range(0, 240, 30)]
    for ticket_id, chunk in enumerate(chunks):
        receiver.agent.expect(
            ticket_id, attempt=0, sender_incarnation=sender.incarnation, block_ids=chunk
        )
    async with asyncio.TaskGroup() as tasks:
        for ticket_id, chunk in enumerate(chunks):
            source = chunk[::-1]
            tasks.create_task(push(connection, receiver, source, chunk, ticket_id=ticket_id))
    for chunk in chunks:
        assert receiver.blocks(chunk) == sender.blocks(chunk[::-1])
    assert sorted(w.ticket_id for w in receiver.received) == list(range(8))


async def test_two_senders_at_once(cluster: Cluster):
    receiver, senders = cluster.node("d"), [cluster.node("p0"), cluster.node("p1")]
    connections = [await cluster.connect(sender, receiver) for sender in senders]
    places = [list(range(100)), list(range(100, 200))]
    for ticket_id, sender in enumerate(senders):
        receiver.agent.expect(
            ticket_id,
            attempt=0,
            sender_incarnation=sender.incarnation,
            block_ids=places[ticket_id],
        )
    async with asyncio.TaskGroup() as tasks:
        for ticket_id, connection in enumerate(connections):
            place = places[ticket_id]
            tasks.create_task(push(connection, receiver, place, place, ticket_id=ticket_id))
    for sender, place in zip(senders, places, strict=True):
        assert receiver.blocks(place) == sender.blocks(place)
    assert {w.sender for w in receiver.received} == {"p0", "p1"}


async def test_both_directions_over_one_pair(cluster: Cluster):
    one, other, connection = await cluster.pair()
    back = await other.agent.connect(one.agent.metadata())
    here, there = list(range(50)), list(range(100, 150))
    one.agent.expect(1, attempt=0, sender_incarnation=other.incarnation, block_ids=here)
    other.agent.expect(1, attempt=0, sender_incarnation=one.incarnation, block_ids=there)
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(push(connection, other, there, there))
        tasks.create_task(push(back, one, here, here))
    assert other.blocks(there) == one.blocks(there)
    assert one.blocks(here) == other.blocks(here)


async def test_transfer_larger_than_window_and_header(cluster: Cluster):
    """4,096 tiny blocks in reverse: thousands of runs, many header parts, many staging buffers."""
    sender = cluster.node("p", num_blocks=4096, block_bytes=64)
    receiver = cluster.node("d", num_blocks=4096, block_bytes=64)
    connection = await cluster.connect(sender, receiver)
    src, dst = list(range(4096)), list(range(4096))[::-1]
    receiver.agent.expect(1, attempt=0, sender_incarnation=sender.incarnation, block_ids=dst)
    await push(connection, receiver, src, dst)
    halves = (receiver.pool[at : at + 64] for at in range(4095 * 64, -1, -64))
    assert b"".join(halves) == bytes(sender.pool)
    assert len(receiver.received) == 1


async def test_counters_of_both_ends(cluster: Cluster):
    sender, receiver, connection = await cluster.pair()
    blocks = list(range(200))
    receiver.agent.expect(1, attempt=0, sender_incarnation=sender.incarnation, block_ids=blocks)
    await push(connection, receiver, blocks, blocks)
    sent = sender.agent.counters["d"].sent
    received = receiver.agent.counters["p"].received
    assert (sent.num_bytes, sent.num_writes) == (200 * BLOCK_BYTES, 1)
    assert (received.num_bytes, received.num_writes) == (200 * BLOCK_BYTES, 1)
    assert sent.gb_per_s is not None
    assert received.gb_per_s is not None


async def test_measure_reports_the_path(cluster: Cluster):
    sender, _, connection = await cluster.pair()
    report = await connection.measure()
    assert report.same_host
    assert report.gb_per_s > 0
    assert sender.agent.counters["d"].sent.gb_per_s is not None
