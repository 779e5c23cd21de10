"""A ZMQ socket driven by the event loop without a future a message."""

import asyncio
from collections.abc import Callable

import zmq

# So many messages are handled before other work of the loop gets its turn.
DRAIN_BUDGET = 512


class LoopSocket:
    """Calls `on_frames` for every message; sends without waiting.

    ZMQ's file descriptor is edge-triggered: it becomes readable when something *may* have
    changed and says nothing more until the socket was read dry, and a send may swallow the edge.
    So a wakeup reads until the socket is empty, and every send schedules one such reading.
    """

    def __init__(self, socket: zmq.Socket[bytes], on_frames: Callable[[list[bytes]], None]) -> None:
        self._socket = socket
        self._on_frames = on_frames
        self._loop = asyncio.get_running_loop()
        self._fd = int(socket.getsockopt(zmq.FD))
        self._scheduled = False
        self._loop.add_reader(self._fd, self.drain)
        self._schedule()

    @property
    def closed(self) -> bool:
        return self._socket.closed

    def send(self, frames: list[bytes]) -> None:
        """Raises zmq.Again if the queue is full, zmq.ZMQError(EHOSTUNREACH) if the peer is gone."""
        self._socket.send_multipart(frames, zmq.NOBLOCK)
        self._schedule()

    def send_if_possible(self, frames: list[bytes]) -> None:
        """For courtesies: a peer that is gone or takes no messages doesn't need them."""
        try:
            self.send(frames)
        except zmq.ZMQError as error:
            if error.errno not in (zmq.EAGAIN, zmq.EHOSTUNREACH):
                raise

    def drain(self, budget: int = DRAIN_BUDGET) -> None:
        """Hands on up to `budget` messages; what is left comes in a later turn of the loop."""
        receive = self._socket.recv_multipart
        try:
            for _ in range(budget):
                if self._socket.closed:
                    return
                try:
                    frames = receive(zmq.NOBLOCK)
                except zmq.Again:
                    return
                self._on_frames(frames)
            self._schedule()
        except BaseException:
            # The handler's error goes to the loop; what waits behind must still be read.
            self._schedule()
            raise

    def close(self, linger_s: float) -> None:
        """Unsent messages get `linger_s` to leave, in ZMQ's own thread."""
        if not self._socket.closed:
            self._loop.remove_reader(self._fd)
            self._socket.close(linger=round(linger_s * 1000))

    def _schedule(self) -> None:
        if not self._scheduled and not self._socket.closed:
            self._scheduled = True
            self._loop.call_soon(self._drain_scheduled)

    def _drain_scheduled(self) -> None:
        self._scheduled = False
        self.drain()
