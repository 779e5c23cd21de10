"""Cancelling, dropping, closing and reconnecting, at awkward moments."""

import asyncio
import dataclasses
import gc
import threading
from pathlib import Path

import pytest
from shared_memory import abandoned_memory, own_memory, own_segments
from transfer_cluster import BLOCK_BYTES, CONFIG, NUM_BLOCKS, Cluster, Node, push, settle

from kvtransfer import Connection
from protocol.errors import TransferCancelledError, TransferError, TransferTimeoutError

EVERYTHING = list(range(NUM_BLOCKS))


def expect_everything(receiver: Node, sender: Node, *, ticket_id: int = 1) -> None:
    receiver.agent.expect(
        ticket_id, attempt=0, sender_incarnation=sender.incarnation, block_ids=EVERYTHING
    )


def first_write(receiver: Node) -> asyncio.Event:
    arrived = asyncio.Event()
    receiver.on_write = lambda _: arrived.set()
    return arrived


def start_writes(connection: Connection, receiver: Node) -> list[asyncio.Task[None]]:
    """Eight writes of the whole pool under one ticket, in parallel."""
    return [
        asyncio.create_task(
            push(connection, receiver, EVERYTHING, EVERYTHING[::-1], write_seq=write_seq)
        )
        for write_seq in range(8)
    ]


async def outcomes(tasks: list[asyncio.Task[None]]) -> list[BaseException]:
    async with asyncio.timeout(5):
        results = await asyncio.gather(*tasks, return_exceptions=True)
    return [result for result in results if result is not None]


async def test_after_cancel_the_source_is_free(cluster: Cluster):
    sender, receiver, connection = await cluster.pair()
    expect_everything(receiver, sender)
    arrived = first_write(receiver)
    tasks = start_writes(connection, receiver)
    await arrived.wait()

    await connection.cancel(1)

    before = bytes(receiver.pool)
    sender.pool[:] = bytes(len(sender.pool))
    errors = await outcomes(tasks)
    await settle(connection)
    assert bytes(receiver.pool) == before
    assert all(isinstance(error, TransferCancelledError) for error in errors)
    assert len(receiver.received) + len(errors) >= 8


async def test_cancel_leaves_other_tickets_alone(cluster: Cluster):
    sender, receiver, connection = await cluster.pair()
    places = {1: EVERYTHING[:100], 2: EVERYTHING[100:]}
    for ticket_id, place in places.items():
        receiver.agent.expect(
            ticket_id, attempt=0, sender_incarnation=sender.incarnation, block_ids=place
        )
    doomed, other = (
        asyncio.create_task(push(connection, receiver, place, place, ticket_id=ticket_id))
        for ticket_id, place in places.items()
    )
    await asyncio.sleep(0)
    await connection.cancel(1)
    assert [type(error) for error in await outcomes([doomed, other])] == [TransferCancelledError]
    assert receiver.blocks(places[2]) == sender.blocks(places[2])


async def test_cancel_of_an_unknown_ticket(cluster: Cluster):
    _, _, connection = await cluster.pair()
    await connection.cancel(77)


async def test_a_cancelled_task_still_lets_cancel_wait_for_its_blocks(cluster: Cluster):
    sender, receiver, connection = await cluster.pair()
    expect_everything(receiver, sender)
    arrived = first_write(receiver)
    tasks = start_writes(connection, receiver)
    await arrived.wait()
    for task in tasks:
        task.cancel()
    await connection.cancel(1)
    before = bytes(receiver.pool)
    sender.pool[:] = bytes(len(sender.pool))
    await outcomes(tasks)
    await settle(connection)
    assert bytes(receiver.pool) == before


async def test_after_close_ticket_nothing_lands(cluster: Cluster):
    sender, receiver, connection = await cluster.pair()
    expect_everything(receiver, sender)
    arrived = first_write(receiver)
    tasks = start_writes(connection, receiver)
    await arrived.wait()

    await receiver.agent.close_ticket(1)

    receiver.pool[:] = bytes(len(receiver.pool))
    num_received = len(receiver.received)
    errors = await outcomes(tasks)
    await settle(connection)
    assert receiver.pool == bytes(len(receiver.pool))
    assert len(receiver.received) == num_received
    assert all("refused" in str(error) for error in errors)


async def test_the_next_owner_of_blocks_gets_them_untouched(cluster: Cluster):
    sender, receiver, connection = await cluster.pair()
    expect_everything(receiver, sender)
    tasks = start_writes(connection, receiver)
    await asyncio.sleep(0)
    await receiver.agent.close_ticket(1)
    expect_everything(receiver, sender, ticket_id=2)
    await push(connection, receiver, EVERYTHING, EVERYTHING, ticket_id=2)
    await outcomes(tasks)
    await settle(connection)
    assert receiver.pool == sender.pool


async def test_dropping_the_receiver_fails_pending_writes(cluster: Cluster):
    sender = cluster.node("p")
    receiver = cluster.node("d", is_started=False)
    connection = await sender.agent.connect(receiver.agent.metadata())
    tasks = start_writes(connection, receiver)
    measuring = asyncio.create_task(connection.measure())
    await asyncio.sleep(0)
    assert sender.agent.drop_peer("d", receiver.incarnation) == []
    errors = await outcomes([*tasks, measuring])
    assert [type(error) for error in errors] == [TransferCancelledError] * 9
    with pytest.raises(TransferCancelledError):
        await push(connection, receiver, [0], [0])
    with pytest.raises(TransferCancelledError):
        await connection.measure()
    assert sender.agent.drop_peer("d", receiver.incarnation) == []


async def test_a_stalled_receiver_times_out(cluster: Cluster):
    sender = cluster.node("p", config=dataclasses.replace(CONFIG, stall_timeout_s=0.05))
    receiver = cluster.node("d", is_started=False)
    connection = await sender.agent.connect(receiver.agent.metadata())
    with pytest.raises(TransferTimeoutError):
        await push(connection, receiver, EVERYTHING, EVERYTHING)


async def test_dropping_the_sender_closes_its_tickets(cluster: Cluster):
    sender, receiver, connection = await cluster.pair()
    other = cluster.node("p2")
    other_connection = await cluster.connect(other, receiver)
    for ticket_id, node, place in ((1, sender, [0, 1]), (2, other, [2, 3])):
        receiver.agent.expect(
            ticket_id, attempt=0, sender_incarnation=node.incarnation, block_ids=place
        )
    assert receiver.agent.drop_peer("p", sender.incarnation) == []
    await receiver.agent.close_ticket(1)
    await push(other_connection, receiver, [2, 3], [2, 3], ticket_id=2)
    task = asyncio.create_task(push(connection, receiver, [0, 1], [0, 1]))
    await settle(other_connection)
    sender.agent.drop_peer("d", receiver.incarnation)
    assert [type(error) for error in await outcomes([task])] == [TransferCancelledError]
    assert [w.ticket_id for w in receiver.received] == [2]


async def test_a_new_incarnation_connects_at_once(cluster: Cluster):
    old, receiver, _ = await cluster.pair()
    expect_everything(receiver, old)
    new = cluster.node("p")
    connection = await cluster.connect(new, receiver)
    expect_everything(receiver, new, ticket_id=2)  # the old one's fence is gone with it
    await push(connection, receiver, EVERYTHING, EVERYTHING, ticket_id=2)
    assert receiver.pool == new.pool


async def test_connecting_twice_gives_the_same_connection(cluster: Cluster):
    sender, receiver, connection = await cluster.pair()
    assert await sender.agent.connect(receiver.agent.metadata()) is connection


async def test_close_with_writes_in_flight(cluster: Cluster):
    sender, receiver, connection = await cluster.pair()
    expect_everything(receiver, sender)
    tasks = start_writes(connection, receiver)
    await asyncio.sleep(0)
    await sender.agent.close()
    errors = await outcomes(tasks)
    assert {type(error) for error in errors} == {TransferCancelledError}
    receiver.agent.drop_peer("p", sender.incarnation)
    await receiver.agent.close_ticket(1)


async def test_agents_that_do_not_fit(cluster: Cluster):
    node, smaller = cluster.node("p"), cluster.node("d", block_bytes=BLOCK_BYTES // 2)
    with pytest.raises(TransferError, match="8192 bytes here and 4096 at worker d"):
        await node.agent.connect(smaller.agent.metadata())
    with pytest.raises(TransferError, match="own tag namespace"):
        await node.agent.connect(node.agent.metadata())
    with pytest.raises(TransferError, match="Unreadable transfer agent metadata"):
        await node.agent.connect(b"\x81nonsense")


def num_entries(directory: str) -> int:
    return sum(1 for _ in Path(directory).iterdir())


def resources() -> dict[str, int]:
    gc.collect()
    return {
        "descriptors": num_entries("/proc/self/fd"),
        "threads": num_entries("/proc/self/task"),
        "python threads": threading.active_count(),
        "/dev/shm": len(own_memory() | abandoned_memory()),
        "System V segments": len(own_segments()),
        "mapped segments": Path("/proc/self/maps").read_text().count("/SYSV"),
    }


async def test_a_hundred_connections_leave_nothing_behind(cluster: Cluster):
    receiver = cluster.node("d")

    async def connect_once(ticket_id: int) -> None:
        sender = cluster.node("p")
        connection = await cluster.connect(sender, receiver)
        expect_everything(receiver, sender, ticket_id=ticket_id)
        await push(connection, receiver, EVERYTHING[:20], EVERYTHING[:20], ticket_id=ticket_id)
        receiver.agent.drop_peer("p", sender.incarnation)
        await sender.agent.close()
        cluster.forget(sender)

    await connect_once(0)
    before = resources()
    for ticket_id in range(1, 101):
        await connect_once(ticket_id)
    for _ in range(1_000):
        left = {kind: n - before[kind] for kind, n in resources().items() if n > before[kind]}
        if not left:
            return
        # UCX closes the sockets of the last ones when it hears of their end.
        await asyncio.sleep(0.01)
    pytest.fail(f"more than before: {left}")
