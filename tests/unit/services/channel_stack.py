"""Ends of control channels, whose events tests wait for."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Self

from protocol.ids import WorkerRef
from services.runtime.channel import ControlChannel
from services.runtime.peers import (
    ChannelEvent,
    ChannelTimings,
    Identity,
    Peer,
    PeerDown,
    PeerUp,
    Received,
)

# Far above what anything here needs; only a bug waits so long.
PATIENCE_S = 20.0


@dataclass
class Recorder:
    """A handler that keeps what it is told and lets tests wait for it."""

    events: list[ChannelEvent] = field(default_factory=list)
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    def __call__(self, event: ChannelEvent) -> None:
        self.events.append(event)
        self.changed.set()

    async def wait_for(self, wanted: Callable[[ChannelEvent], bool]) -> ChannelEvent:
        async with asyncio.timeout(PATIENCE_S):
            while True:
                for event in self.events:
                    if wanted(event):
                        return event
                self.changed.clear()
                await self.changed.wait()

    async def up(self) -> Peer:
        return (await self.wait_for(lambda event: isinstance(event, PeerUp))).peer

    async def down(self) -> PeerDown:
        event = await self.wait_for(lambda event: isinstance(event, PeerDown))
        assert isinstance(event, PeerDown)
        return event

    @property
    def messages(self) -> list[object]:
        return [event.message for event in self.events if isinstance(event, Received)]


@dataclass
class End:
    channel: ControlChannel
    events: Recorder


class Stack:
    """Channels that are closed at the end of the test."""

    def __init__(self) -> None:
        self.ends: list[End] = []

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        for end in self.ends:
            await end.channel.close()

    def end(self, peer_id: str, incarnation: int = 1, **timings: float) -> End:
        recorder = Recorder()
        channel = ControlChannel(
            Identity(peer_id, incarnation), recorder, timings=ChannelTimings(**timings)
        )
        self.ends.append(End(channel, recorder))
        return self.ends[-1]

    def worker(self, peer_id: str = "decode-0", incarnation: int = 7, **timings: float):
        end = self.end(peer_id, incarnation, **timings)
        address = end.channel.listen("tcp://127.0.0.1:0")
        return end, WorkerRef(peer_id, incarnation, address)
