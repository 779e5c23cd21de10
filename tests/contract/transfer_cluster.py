"""Agents over either transport, all in this process, as the contract tests use them."""

import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass, field

from kvtransfer import Connection, KVRegion, TransferAgent, TransferConfig, Transport, WriteReceived
from kvtransfer.local import LocalFabric, LocalTransport
from kvtransfer.ucx import UcxTransport

BLOCK_BYTES = 8 << 10
NUM_BLOCKS = 256

# Small enough that tests use several messages, several header parts and both ways of sending.
CONFIG = TransferConfig(
    max_message_bytes=16 * BLOCK_BYTES,
    window_bytes=32 * BLOCK_BYTES,
    gather_below_bytes=3 * BLOCK_BYTES,
    gathered_message_bytes=8 * BLOCK_BYTES,
)


@dataclass
class Node:
    """An agent, its pool and what it was notified of."""

    agent: TransferAgent
    pool: bytearray
    worker_id: str
    incarnation: int
    received: list[WriteReceived] = field(default_factory=list)
    on_write: Callable[[WriteReceived], None] | None = None

    def notify(self, write: WriteReceived) -> None:
        self.received.append(write)
        if self.on_write is not None:
            self.on_write(write)

    def block(self, block_id: int) -> bytes:
        return bytes(self.pool[block_id * BLOCK_BYTES : (block_id + 1) * BLOCK_BYTES])

    def blocks(self, block_ids: list[int]) -> list[bytes]:
        return [self.block(block_id) for block_id in block_ids]


async def push(
    connection: Connection,
    receiver: Node,
    src: list[int],
    dst: list[int],
    *,
    ticket_id: int = 1,
    attempt: int = 0,
    write_seq: int = 0,
) -> None:
    """`Connection.write` with the defaults that most tests want."""
    await connection.write(
        ticket_id=ticket_id,
        attempt=attempt,
        receiver_incarnation=receiver.incarnation,
        src_blocks=src,
        dst_blocks=dst,
        write_seq=write_seq,
    )


async def settle(connection: Connection) -> None:
    """Goes to the peer and back behind all that was sent before, so that it has been handled."""
    await connection.measure()


class Cluster:
    """Makes nodes and connects them; everything is closed at the end of the test."""

    def __init__(
        self, make_transport: Callable[[], Transport], make_region: type[KVRegion] = KVRegion
    ) -> None:
        self._make_transport = make_transport
        self._make_region = make_region
        self._incarnations = itertools.count(1001)
        self._nodes: list[Node] = []

    def transport(self) -> Transport:
        """A bare one, which the test closes."""
        return self._make_transport()

    def node(
        self,
        worker_id: str,
        *,
        config: TransferConfig = CONFIG,
        num_blocks: int = NUM_BLOCKS,
        block_bytes: int = BLOCK_BYTES,
        is_started: bool = True,
    ) -> Node:
        """An agent with a random pool; one that isn't started is like a stopped process."""
        incarnation = next(self._incarnations)
        pool = bytearray(random.Random(incarnation).randbytes(num_blocks * block_bytes))
        agent = TransferAgent(
            self._make_transport(),
            self._make_region(memoryview(pool), num_blocks=num_blocks, block_bytes=block_bytes),
            worker_id=worker_id,
            incarnation=incarnation,
            on_write=lambda write: node.notify(write),
            config=config,
        )
        if is_started:
            agent.start()
        node = Node(agent, pool, worker_id, incarnation)
        self._nodes.append(node)
        return node

    async def connect(self, sender: Node, receiver: Node) -> Connection:
        """Returns the sender's connection; the receiver connects first, as its service does."""
        await receiver.agent.connect(sender.agent.metadata())
        return await sender.agent.connect(receiver.agent.metadata())

    def forget(self, node: Node) -> None:
        """Its test closed it."""
        self._nodes.remove(node)

    async def pair(self, config: TransferConfig = CONFIG) -> tuple[Node, Node, Connection]:
        """A sender, a receiver, and the sender's connection."""
        sender, receiver = self.node("p", config=config), self.node("d", config=config)
        return sender, receiver, await self.connect(sender, receiver)

    async def close(self) -> None:
        for node in self._nodes:
            await node.agent.close()


def transport_maker(name: str) -> Callable[[], Transport]:
    if name == "ucx":
        return UcxTransport
    fabric = LocalFabric()
    return lambda: LocalTransport(fabric)
