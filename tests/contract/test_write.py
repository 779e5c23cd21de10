"""Blocks arrive unchanged, exactly where they should, and are announced once, after the data."""

import random

import pytest
from transfer_cluster import BLOCK_BYTES, NUM_BLOCKS, Cluster, Node

from kvtransfer import Connection


async def push(
    connection: Connection,
    receiver: Node,
    src: list[int],
    dst: list[int],
    *,
    ticket_id: int = 1,
    write_seq: int = 0,
) -> None:
    await connection.write(
        ticket_id=ticket_id,
        attempt=0,
        receiver_incarnation=receiver.incarnation,
        src_blocks=src,
        dst_blocks=dst,
        write_seq=write_seq,
    )


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
    sender, receiver = cluster.node("p"), cluster.node("d")
    connection = await cluster.connect(sender, receiver)
    untouched = {b: receiver.block(b) for b in range(NUM_BLOCKS) if b not in dst}
    receiver.agent.expect(1, attempt=0, sender_incarnation=sender.incarnation, block_ids=dst)

    await push(connection, receiver, src, dst)

    assert receiver.blocks(dst) == sender.blocks(src)
    assert {b: receiver.block(b) for b in untouched} == untouched
    [received] = receiver.received
    assert (received.ticket_id, received.write_seq, received.sender) == (1, 0, "p")
    assert received.num_bytes == len(src) * BLOCK_BYTES


async def test_a_write_without_blocks_is_a_notification(cluster: Cluster):
    sender, receiver = cluster.node("p"), cluster.node("d")
    connection = await cluster.connect(sender, receiver)
    receiver.agent.expect(1, attempt=0, sender_incarnation=sender.incarnation, block_ids=[])
    await push(connection, receiver, [], [], write_seq=9)
    assert [w.write_seq for w in receiver.received] == [9]
