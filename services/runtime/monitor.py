"""Connection events of a ZMQ socket, as callbacks in the event loop."""

from collections.abc import Callable

import zmq
from zmq.utils.monitor import parse_monitor_message

from services.runtime.loop_socket import LoopSocket


class SocketMonitor:
    """Calls `on_event` with the number of each of the chosen `zmq.EVENT_*` of `socket`."""

    def __init__(
        self, socket: zmq.Socket[bytes], events: int, on_event: Callable[[int], None]
    ) -> None:
        self._watched = socket
        self._on_event = on_event
        self._socket = LoopSocket(socket.get_monitor_socket(events), self._on_frames)

    def close(self) -> None:
        """To be called before the watched socket is closed."""
        if not self._socket.closed:
            # In this order: an I/O thread that reports an event while nobody can receive it waits
            # for ever, holding the lock that disabling takes.
            self._watched.disable_monitor()
            self._socket.close(0.0)

    def _on_frames(self, frames: list[bytes]) -> None:
        self._on_event(int(parse_monitor_message(frames)["event"]))
