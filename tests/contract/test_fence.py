"""What the fence refuses never touches memory, and the sender is told why."""

import dataclasses

import pytest
from transfer_cluster import CONFIG, NUM_BLOCKS, Cluster, Node, push

from kvtransfer import checksum, outgoing
from protocol.errors import TransferError

BLOCKS = list(range(10, 50))


def expect(receiver: Node, sender: Node, *, ticket_id: int = 1, attempt: int = 0) -> None:
    receiver.agent.expect(
        ticket_id,
        attempt=attempt,
        sender_incarnation=sender.incarnation,
        block_ids=BLOCKS,
    )


async def test_unknown_ticket(cluster: Cluster):
    _, receiver, connection = await cluster.pair()
    before = bytes(receiver.pool)
    with pytest.raises(TransferError, match="ticket 1 is not open"):
        await push(connection, receiver, BLOCKS, BLOCKS)
    assert bytes(receiver.pool) == before
    assert receiver.received == []


async def test_stale_attempt(cluster: Cluster):
    sender, receiver, connection = await cluster.pair()
    expect(receiver, sender, attempt=2)
    before = bytes(receiver.pool)
    with pytest.raises(TransferError, match="is for attempt 2, not 1"):
        await push(connection, receiver, BLOCKS, BLOCKS, attempt=1)
    assert bytes(receiver.pool) == before
    await push(connection, receiver, BLOCKS, BLOCKS, attempt=2)
    assert receiver.blocks(BLOCKS) == sender.blocks(BLOCKS)


async def test_ticket_of_another_sender_incarnation(cluster: Cluster):
    sender, receiver, connection = await cluster.pair()
    receiver.agent.expect(1, attempt=0, sender_incarnation=sender.incarnation + 1, block_ids=BLOCKS)
    before = bytes(receiver.pool)
    with pytest.raises(TransferError, match="another sender incarnation"):
        await push(connection, receiver, BLOCKS, BLOCKS)
    assert bytes(receiver.pool) == before


async def test_write_for_another_receiver_incarnation(cluster: Cluster):
    sender, receiver, connection = await cluster.pair()
    expect(receiver, sender)
    before = bytes(receiver.pool)
    with pytest.raises(TransferError, match="another incarnation of this worker"):
        await connection.write(
            ticket_id=1,
            attempt=0,
            receiver_incarnation=receiver.incarnation + 1,
            src_blocks=BLOCKS,
            dst_blocks=BLOCKS,
            write_seq=0,
        )
    assert bytes(receiver.pool) == before


@pytest.mark.parametrize("foreign", [9, 50, NUM_BLOCKS, NUM_BLOCKS + 7])
async def test_block_outside_the_ticket(cluster: Cluster, foreign: int):
    sender, receiver, connection = await cluster.pair()
    expect(receiver, sender)
    before = bytes(receiver.pool)
    with pytest.raises(TransferError, match=f"block {foreign} is not part of ticket 1"):
        await push(connection, receiver, BLOCKS, [*BLOCKS[:-1], foreign])
    assert bytes(receiver.pool) == before


async def test_the_same_write_twice(cluster: Cluster):
    sender, receiver, connection = await cluster.pair()
    expect(receiver, sender)
    await push(connection, receiver, BLOCKS, BLOCKS, write_seq=4)
    with pytest.raises(TransferError, match="write 4 of ticket 1 was made before"):
        await push(connection, receiver, BLOCKS, BLOCKS, write_seq=4)
    assert len(receiver.received) == 1


async def test_closed_ticket(cluster: Cluster):
    sender, receiver, connection = await cluster.pair()
    expect(receiver, sender)
    await receiver.agent.close_ticket(1)
    before = bytes(receiver.pool)
    with pytest.raises(TransferError, match="ticket 1 is not open"):
        await push(connection, receiver, BLOCKS, BLOCKS)
    assert bytes(receiver.pool) == before


async def test_a_refusal_leaves_the_connection_usable(cluster: Cluster):
    sender, receiver, connection = await cluster.pair()
    everything = list(range(NUM_BLOCKS))
    for _ in range(3):
        with pytest.raises(TransferError, match="not open"):
            await push(connection, receiver, everything, everything[::-1])
    expect(receiver, sender)
    await push(connection, receiver, BLOCKS, BLOCKS)
    assert receiver.blocks(BLOCKS) == sender.blocks(BLOCKS)


async def test_source_block_outside_the_pool(cluster: Cluster):
    _, receiver, connection = await cluster.pair()
    with pytest.raises(TransferError, match="outside the pool"):
        await push(connection, receiver, [NUM_BLOCKS], [0])


async def test_lists_of_different_length(cluster: Cluster):
    _, receiver, connection = await cluster.pair()
    with pytest.raises(TransferError, match="2 blocks can't go to 1 places"):
        await push(connection, receiver, [1, 2], [0])


async def test_a_block_is_in_one_ticket_only(cluster: Cluster):
    sender, receiver, _ = await cluster.pair()
    expect(receiver, sender)
    with pytest.raises(TransferError, match="Block 10 of ticket 2 belongs to ticket 1"):
        expect(receiver, sender, ticket_id=2)
    with pytest.raises(TransferError, match="open already"):
        expect(receiver, sender)
    await receiver.agent.close_ticket(1)
    expect(receiver, sender, ticket_id=2)


async def test_checksums_pass_on_sound_data(cluster: Cluster):
    config = dataclasses.replace(CONFIG, verify_checksums=True)
    sender, receiver, connection = await cluster.pair(config)
    expect(receiver, sender)
    await push(connection, receiver, BLOCKS, BLOCKS[::-1])
    assert receiver.blocks(BLOCKS[::-1]) == sender.blocks(BLOCKS)


async def test_checksum_mismatch_names_the_blocks(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
):
    config = dataclasses.replace(CONFIG, verify_checksums=True)
    sender, receiver, connection = await cluster.pair(config)
    expect(receiver, sender)
    monkeypatch.setattr(outgoing, "crc32_of", lambda *args: checksum.crc32_of(*args) ^ 1)
    with pytest.raises(TransferError, match=r"checksum mismatch in blocks 10\.\.13"):
        await push(connection, receiver, [1, 2, 3, 4], [10, 11, 12, 13])
    assert receiver.received == []


async def test_checksums_need_both_sides(cluster: Cluster):
    sender = cluster.node("p")
    receiver = cluster.node("d", config=dataclasses.replace(CONFIG, verify_checksums=True))
    connection = await cluster.connect(sender, receiver)
    expect(receiver, sender)
    with pytest.raises(TransferError, match="both sides need the same setting"):
        await push(connection, receiver, BLOCKS, BLOCKS)
