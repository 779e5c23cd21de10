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

    def block(self, block_id: int) -> bytes:
        return bytes(self.pool[block_id * BLOCK_BYTES : (block_id + 1) * BLOCK_BYTES])

    def blocks(self, block_ids: list[int]) -> list[bytes]:
        return [self.block(block_id) for block_id in block_ids]


class Cluster:
    """Makes nodes and connects them; everything is closed at the end of the test."""

    def __init__(self, make_transport: Callable[[], Transport]) -> None:
        self._make_transport = make_transport
        self._incarnations = itertools.count(1001)
        self._nodes: list[Node] = []

    def node(
        self,
        worker_id: str,
        *,
        config: TransferConfig = CONFIG,
        num_blocks: int = NUM_BLOCKS,
        block_bytes: int = BLOCK_BYTES,
    ) -> Node:
        incarnation = next(self._incarnations)
        pool = bytearray(random.Random(incarnation).randbytes(num_blocks * block_bytes))
        received: list[WriteReceived] = []
        agent = TransferAgent(
            self._make_transport(),
            KVRegion(memoryview(pool), num_blocks=num_blocks, block_bytes=block_bytes),
            worker_id=worker_id,
            incarnation=incarnation,
            on_write=received.append,
            config=config,
        )
        agent.start()
        node = Node(agent, pool, worker_id, incarnation, received)
        self._nodes.append(node)
        return node

    async def connect(self, sender: Node, receiver: Node) -> Connection:
        """Returns the sender's connection; the receiver connects first, as its service does."""
        await receiver.agent.connect(sender.agent.metadata())
        return await sender.agent.connect(receiver.agent.metadata())

    async def close(self) -> None:
        for node in self._nodes:
            await node.agent.close()


def transport_maker(name: str) -> Callable[[], Transport]:
    if name == "ucx":
        return UcxTransport
    fabric = LocalFabric()
    return lambda: LocalTransport(fabric)
