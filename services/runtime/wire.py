"""How control messages look on a socket, and how the sockets are set up."""

import msgspec
import zmq

from protocol.decoding import decode
from protocol.messages import ControlMessage, Goodbye, Heartbeat
from services.runtime.peers import ChannelTimings

# A prompt of a million tokens is 5 MB; nothing larger is sent here.
MAX_MESSAGE_BYTES = 64 << 20
RECONNECT_INTERVAL_MS = 50

_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(ControlMessage)


def encode_message(message: ControlMessage) -> bytes:
    return _encoder.encode(message)


def decode_message(payload: bytes) -> ControlMessage:
    """Raises UnreadableError."""
    return decode(_decoder, payload)


HEARTBEAT_PAYLOAD = encode_message(Heartbeat())
GOODBYE_PAYLOAD = encode_message(Goodbye())


def configure(socket: zmq.Socket[bytes], timings: ChannelTimings) -> None:
    """Bounded queues, and pings between the two processes' I/O threads."""
    interval_ms = round(timings.heartbeat_interval_s * 1000)
    timeout_ms = round(timings.transport_timeout_s * 1000)
    # Set before there is any connection: one that closes on its own, ahead of its socket, lingers
    # as long as the option said then, and the default is for ever.
    socket.setsockopt(zmq.LINGER, round(timings.goodbye_linger_s * 1000))
    socket.setsockopt(zmq.SNDHWM, timings.send_queue_messages)
    socket.setsockopt(zmq.RCVHWM, timings.send_queue_messages)
    socket.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)
    socket.setsockopt(zmq.HEARTBEAT_IVL, interval_ms)
    socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, timeout_ms)
    socket.setsockopt(zmq.HEARTBEAT_TTL, timeout_ms)
    socket.setsockopt(zmq.HANDSHAKE_IVL, timeout_ms)
    socket.setsockopt(zmq.RECONNECT_IVL, RECONNECT_INTERVAL_MS)
