"""The incoming messages of one peer, handled strictly in the order in which they were sent.

A data message means something only after the header before it was read, and reading a header
may take a moment.
"""

import logging
from collections import deque
from collections.abc import Callable

from kvtransfer.tags import MessageKind, Tag
from kvtransfer.transport import Arrival
from kvtransfer.wire import MAX_CONTROL_BYTES, AgentMessage, decode_message
from protocol.errors import TransferError

logger = logging.getLogger(__name__)


class Inbox:
    """Passes control messages to `on_control` and data messages to `on_data(sequence, arrival)`."""

    def __init__(
        self,
        *,
        on_control: Callable[[AgentMessage], None],
        on_data: Callable[[int, Arrival], None],
    ) -> None:
        self._on_control = on_control
        self._on_data = on_data
        self._waiting: deque[tuple[Tag, Arrival]] = deque()
        self._is_reading = False
        self._is_closed = False

    def push(self, tag: Tag, arrival: Arrival) -> None:
        if self._is_closed:
            arrival.discard()
            return
        self._waiting.append((tag, arrival))
        self._drain()

    def close(self) -> None:
        """Discards what waits and whatever else comes."""
        self._is_closed = True
        while self._waiting:
            self._waiting.popleft()[1].discard()

    def _drain(self) -> None:
        while self._waiting and not self._is_reading:
            tag, arrival = self._waiting.popleft()
            if tag.kind is MessageKind.DATA:
                self._on_data(tag.sequence, arrival)
            elif arrival.num_bytes > MAX_CONTROL_BYTES:
                logger.error("discarded a control message of %d bytes", arrival.num_bytes)
                arrival.discard()
            else:
                self._read(arrival)

    def _read(self, arrival: Arrival) -> None:
        buffer = bytearray(arrival.num_bytes)
        self._is_reading = True

        def on_read(error: str | None) -> None:
            self._is_reading = False
            if self._is_closed:
                return
            if error is not None:
                logger.error("could not read a control message: %s", error)
            else:
                self._handle(buffer)
            self._drain()

        arrival.receive_into(memoryview(buffer), on_read)

    def _handle(self, buffer: bytearray) -> None:
        try:
            message = decode_message(buffer)
        except TransferError as error:
            logger.error("%s", error)
            return
        self._on_control(message)
