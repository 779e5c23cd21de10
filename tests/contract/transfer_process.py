"""A worker process that only transfers: its agent obeys commands from the test.

Sender and receiver fill or check their pools by the same formula, so the test needn't see bytes.
"""

import asyncio
import multiprocessing
import os
import signal
import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection as Pipe
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import psutil

from kvtransfer import (
    Connection,
    DeviceRegion,
    KVRegion,
    TransferAgent,
    TransferConfig,
    WriteReceived,
)
from kvtransfer.ucx import DEVICE_MEMORY_SETTINGS, UcxTransport
from protocol.errors import TransferError

NUM_BLOCKS = 64
BLOCK_BYTES = 1 << 20
CONFIG = TransferConfig(max_message_bytes=4 << 20, window_bytes=16 << 20)
DEVICE_CONFIG = replace(CONFIG, gather_below_bytes=4 << 20, gathered_message_bytes=4 << 20)
START_TIMEOUT_S = 60
ANSWER_TIMEOUT_S = 20


class HostPool:
    """Blocks in host memory."""

    config = CONFIG

    def __init__(self) -> None:
        self._pool = bytearray(NUM_BLOCKS * BLOCK_BYTES)
        self.region = KVRegion(
            memoryview(self._pool), num_blocks=NUM_BLOCKS, block_bytes=BLOCK_BYTES
        )

    def transport(self) -> UcxTransport:
        return UcxTransport()

    def fill(self, block_id: int, value: int) -> None:
        start = block_id * BLOCK_BYTES
        self._pool[start : start + BLOCK_BYTES] = bytes([value]) * BLOCK_BYTES


class CudaPool:
    """Blocks on a CUDA device."""

    config = DEVICE_CONFIG

    def __init__(self, device: str) -> None:
        # The processes of host memory do without torch, which takes seconds to load.
        import torch

        from engine.device_blocks import DeviceBlocks

        torch.cuda.set_device(device)
        self._pool = torch.zeros((NUM_BLOCKS, BLOCK_BYTES), dtype=torch.uint8, device="cuda")
        self._synchronize = torch.cuda.synchronize
        self._synchronize()
        self.region = DeviceRegion(
            DeviceBlocks(self._pool), num_blocks=NUM_BLOCKS, block_bytes=BLOCK_BYTES
        )

    def transport(self) -> UcxTransport:
        return UcxTransport(DEVICE_MEMORY_SETTINGS, peers_write=True)

    def fill(self, block_id: int, value: int) -> None:
        self._pool[block_id].fill_(value)
        # As `Engine.execute`: what transfers read on their own stream is complete.
        self._synchronize()


class TransferWorker:
    """The child's side."""

    def __init__(self, worker_id: str, incarnation: int, memory: str) -> None:
        self._pool = HostPool() if memory == "host" else CudaPool(memory)
        self._agent = TransferAgent(
            self._pool.transport(),
            self._pool.region,
            worker_id=worker_id,
            incarnation=incarnation,
            on_write=self._on_write,
            config=self._pool.config,
        )
        self._agent.start()
        self._connections: dict[int, Connection] = {}
        self._num_received = 0
        self._die_after: int | None = None
        self._writing: asyncio.Task[str] | None = None

    def _on_write(self, _: WriteReceived) -> None:
        self._num_received += 1
        if self._num_received == self._die_after:
            os.kill(os.getpid(), signal.SIGKILL)

    async def metadata(self) -> bytes:
        return self._agent.metadata()

    async def connect(self, incarnation: int, metadata: bytes) -> None:
        self._connections[incarnation] = await self._agent.connect(metadata)

    async def fill(self, seed: int) -> None:
        for block_id in range(NUM_BLOCKS):
            self._pool.fill(block_id, (seed + block_id) % 251)

    async def holds(self, seed: int, block_ids: list[int]) -> bool:
        return all(
            bytes(self._pool.region.host_bytes((b, 1))) == bytes([(seed + b) % 251]) * BLOCK_BYTES
            for b in block_ids
        )

    async def expect(self, ticket_id: int, sender_incarnation: int, block_ids: list[int]) -> None:
        self._agent.expect(
            ticket_id, attempt=0, sender_incarnation=sender_incarnation, block_ids=block_ids
        )

    async def die_after(self, num_writes: int) -> None:
        self._die_after = num_writes

    async def num_received(self) -> int:
        return self._num_received

    async def write(
        self, incarnation: int, ticket_id: int, write_seq: int, block_ids: list[int]
    ) -> str:
        try:
            await self._connections[incarnation].write(
                ticket_id=ticket_id,
                attempt=0,
                receiver_incarnation=incarnation,
                src_blocks=block_ids,
                dst_blocks=block_ids,
                write_seq=write_seq,
            )
        except TransferError as error:
            return type(error).__name__
        return "written"

    async def start_writing(self, incarnation: int, ticket_id: int) -> None:
        """Writes the whole pool again and again."""

        async def forever() -> str:
            for write_seq in range(1_000_000):
                outcome = await self.write(
                    incarnation, ticket_id, write_seq, list(range(NUM_BLOCKS))
                )
                if outcome != "written":
                    return outcome
            return "never stopped"

        self._writing = asyncio.create_task(forever())

    async def end_of_writing(self) -> str:
        assert self._writing is not None
        return await self._writing

    async def drop(self, worker_id: str, incarnation: int) -> list[int]:
        return self._agent.drop_peer(worker_id, incarnation)

    async def close_ticket(self, ticket_id: int) -> None:
        await self._agent.close_ticket(ticket_id)

    async def is_same_host(self, incarnation: int) -> bool:
        return (await self._connections[incarnation].measure()).same_host

    async def num_bytes_sent_over_tcp(self) -> int:
        connections = psutil.Process().net_connections(kind="tcp")
        return sum(
            _num_bytes_acknowledged(connection.fd)
            for connection in connections
            if connection.status == psutil.CONN_ESTABLISHED
        )

    async def shared_writable_memory(self) -> set[tuple[str, str]]:
        """Device and inode of each mapping that others may have, too."""
        return _shared_writable_memory()

    async def close(self) -> None:
        await self._agent.close()


def _shared_writable_memory() -> set[tuple[str, str]]:
    fields = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    return {
        (field[3], field[4])
        for field in fields
        # The driver's device files are everybody's.
        if field[1] == "rw-s" and not field[-1].startswith("/dev/nvidia")
    }


def _num_bytes_acknowledged(fd: int) -> int:
    """Of a connected TCP socket, from the kernel's `struct tcp_info`."""
    with socket.socket(fileno=os.dup(fd)) as connection:
        info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 128)
    (num_bytes,) = struct.unpack_from("=Q", info, 120)
    return num_bytes


def _main(pipe: Pipe, worker_id: str, incarnation: int, memory: str) -> None:
    asyncio.run(_obey(pipe, worker_id, incarnation, memory))


async def _obey(pipe: Pipe, worker_id: str, incarnation: int, memory: str) -> None:
    worker = TransferWorker(worker_id, incarnation, memory)
    readable = asyncio.Event()
    asyncio.get_running_loop().add_reader(pipe.fileno(), readable.set)
    method = None
    while method != "close":
        await readable.wait()
        while method != "close" and pipe.poll():
            method, arguments = pipe.recv()
            pipe.send(await getattr(worker, method)(*arguments))
        readable.clear()


@dataclass
class TransferProcess:
    """The test's side: `call("write", …)` runs the worker's method of that name."""

    worker_id: str
    incarnation: int
    process: BaseProcess
    pipe: Pipe

    @classmethod
    def start(cls, worker_id: str, incarnation: int, memory: str) -> "TransferProcess":
        spawn = multiprocessing.get_context("spawn")
        ours, theirs = spawn.Pipe()
        process = spawn.Process(
            target=_main, args=(theirs, worker_id, incarnation, memory), daemon=True, name=worker_id
        )
        process.start()
        theirs.close()
        return cls(worker_id, incarnation, process, ours)

    def call(self, method: str, *arguments: Any, timeout_s: float = ANSWER_TIMEOUT_S) -> Any:
        self.begin(method, *arguments)
        return self.answer(timeout_s=timeout_s)

    def begin(self, method: str, *arguments: Any) -> None:
        self.pipe.send((method, arguments))

    def answer(self, *, timeout_s: float = ANSWER_TIMEOUT_S) -> Any:
        assert self.pipe.poll(timeout_s), f"{self.worker_id} did not answer"
        return self.pipe.recv()

    def connect_to(self, other: "TransferProcess") -> None:
        """Both ways; the other side connects first."""
        other.call("connect", self.incarnation, self.call("metadata", timeout_s=START_TIMEOUT_S))
        self.call("connect", other.incarnation, other.call("metadata", timeout_s=START_TIMEOUT_S))

    def kill(self) -> None:
        self.process.kill()
        self.process.join()

    def stop(self) -> None:
        """Ends it in the orderly way, or not, if it doesn't answer."""
        if self.process.is_alive() and self.process.pid is not None:
            os.kill(self.process.pid, signal.SIGCONT)
            self.begin("close")
            self.process.join(ANSWER_TIMEOUT_S)
        if self.process.is_alive():
            self.kill()
        self.pipe.close()


Starter = Callable[[str], TransferProcess]
