"""Transport between agents of one event loop: for tests, and for workers that share a process."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count

from kvtransfer.buffer import Buffer
from kvtransfer.transport import Lane, OnArrival, OnDone
from protocol.errors import TransferError


class LocalFabric:
    """What `LocalTransport`s that may reach each other have in common."""

    def __init__(self) -> None:
        self._transports: dict[bytes, LocalTransport] = {}
        self._numbers = count()

    def join(self, transport: "LocalTransport") -> bytes:
        address = b"local-%d" % next(self._numbers)
        self._transports[address] = transport
        return address

    def leave(self, address: bytes) -> None:
        self._transports.pop(address, None)

    def find(self, address: bytes) -> "LocalTransport | None":
        return self._transports.get(address)


class LocalTransport:
    """Copies directly from the sender's memory when the receiver takes a message."""

    name = "local"

    def __init__(self, fabric: LocalFabric) -> None:
        self._fabric = fabric
        self._on_arrival: OnArrival | None = None
        self.address = fabric.join(self)

    def start(self, on_arrival: OnArrival) -> None:
        self._on_arrival = on_arrival

    def connect(self, address: bytes) -> Lane:
        if self._fabric.find(address) is None:
            raise TransferError(f"No agent at local address {address.decode()}.")
        return _LocalLane(lambda: self._fabric.find(address))

    def deliver(self, message: "_LocalMessage") -> None:
        if self._on_arrival is not None and message.is_pending:
            self._on_arrival(message)

    async def close(self) -> None:
        self._fabric.leave(self.address)
        self._on_arrival = None


class _LocalLane:
    def __init__(self, find_peer: Callable[[], LocalTransport | None]) -> None:
        self._find_peer = find_peer
        self._pending: dict[int, _LocalMessage] = {}

    def send(self, buffer: Buffer, tag: int, on_done: OnDone) -> None:
        assert isinstance(buffer, memoryview), "it copies host memory only"
        peer = self._find_peer()
        message = _LocalMessage(tag, buffer, on_done, self._pending)
        self._pending[id(message)] = message
        # A vanished peer answers nothing, like a dead process behind shared memory.
        if peer is not None:
            asyncio.get_running_loop().call_soon(peer.deliver, message)

    def close(self) -> None:
        for message in list(self._pending.values()):
            message.end_send("the lane was closed")


@dataclass(eq=False, slots=True)
class _LocalMessage:
    """A sent message, and its arrival at the other end."""

    tag: int
    _source: memoryview
    _on_sent: OnDone
    _lane: dict[int, "_LocalMessage"]
    num_bytes: int = field(init=False)

    def __post_init__(self) -> None:
        self.num_bytes = self._source.nbytes

    @property
    def is_pending(self) -> bool:
        return id(self) in self._lane

    def receive_into(self, buffer: Buffer, on_done: OnDone) -> None:
        assert isinstance(buffer, memoryview), "it copies host memory only"
        error = None
        if self.is_pending:
            buffer[:] = self._source
            self.end_send(None)
        else:
            error = "the sender's lane was closed"
        asyncio.get_running_loop().call_soon(on_done, error)

    def discard(self) -> None:
        if self.is_pending:
            self.end_send(None)

    def end_send(self, error: str | None) -> None:
        del self._lane[id(self)]
        self._on_sent(error)
