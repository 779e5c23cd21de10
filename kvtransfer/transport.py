"""The seam between the agent and what moves bytes; `ucx` and `local` implement it.

A transport moves tagged messages. It never writes into memory that the receiver didn't hand it
for that very message: a message first *arrives* (tag and size are known, its bytes may still be
with the sender), the agent looks at the tag, and only then gives it a place or throws it away.

All calls and callbacks happen in the event loop's thread.
"""

from collections.abc import Callable
from typing import Protocol, TypeAlias

from kvtransfer.buffer import Buffer

OnDone: TypeAlias = Callable[[str | None], None]
"""Called exactly once when an operation ends: None, or the reason why it failed."""


class Arrival(Protocol):
    """One incoming message. Exactly one of its methods must be called, once."""

    @property
    def tag(self) -> int: ...

    @property
    def num_bytes(self) -> int: ...

    def receive_into(self, buffer: Buffer, on_done: OnDone) -> None:
        """Puts the message into `buffer`, of `num_bytes` bytes; it must live until `on_done`."""
        ...

    def discard(self) -> None:
        """Takes the message off the lane and lets the sender's operation end."""
        ...


OnArrival: TypeAlias = Callable[[Arrival], None]


class Lane(Protocol):
    """An ordered way to one peer: messages arrive in the order in which they were sent."""

    def send(self, buffer: Buffer, tag: int, on_done: OnDone) -> None:
        """Sends `buffer`, which must stay unchanged until `on_done`."""
        ...

    def close(self) -> None:
        """Ends the lane; unfinished sends end with an error before this returns.

        Receives that this process can finish by itself are finished first, for some milliseconds
        at most.
        """
        ...


class Transport(Protocol):
    """One process's end of a transport."""

    @property
    def name(self) -> str: ...

    @property
    def address(self) -> bytes:
        """What a peer's `connect` needs."""
        ...

    def start(self, on_arrival: OnArrival) -> None:
        """Begins to deliver arrivals, within the running event loop."""
        ...

    def connect(self, address: bytes) -> Lane:
        """Raises TransferError if the address can't be used."""
        ...

    async def close(self) -> None:
        """Frees everything; the lanes must be closed before."""
        ...
