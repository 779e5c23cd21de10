"""What agents say to each other: metadata over the control plane, the rest on the transport.

A write is announced in parts. Each `WritePart` goes ahead of the data messages that it describes,
on the same ordered lane. The receiver answers the whole write once, by `WriteDone` or
`WriteRefused`.

On one host's GPUs the receiver may read the sender's pool itself: it's offered by `OfferPool`, and
if `PoolMapped` says so, a write's parts are `ReadPart`s and no data messages follow them.
"""

from typing import TypeAlias

import msgspec

from kvtransfer.region import Run
from protocol.decoding import decode
from protocol.errors import TransferError, UnreadableError
from protocol.ids import Incarnation, TicketId, WorkerId

AGENT_PROTOCOL_VERSION = 3

MAX_HEADER_BYTES = 8000
"""A header of data messages stays below what UCX sends eagerly over TCP by itself (8 KiB), so it
never waits for the receiver's memory."""

MAX_CONTROL_BYTES = 33_000
"""Nothing larger is taken for a control message. `ReadPart`s come near it; the transport between
processes on GPUs is set to send them eagerly, too."""


class HostIdentity(msgspec.Struct, frozen=True):
    """Tells whether two processes can reach each other's memory; namespaces are those of Linux."""

    boot_id: str
    hostname: str
    pid_namespace: str
    ipc_namespace: str


class AgentMetadata(msgspec.Struct, frozen=True, kw_only=True):
    """All that a peer needs to connect."""

    protocol_version: int
    transport: str
    worker_id: WorkerId
    incarnation: Incarnation
    block_bytes: int
    tag_namespace: int
    address: bytes
    host: HostIdentity


class DataMessage(msgspec.Struct, frozen=True, array_like=True):
    """One data message: its bytes go to `dst_runs` one behind the other."""

    dst_runs: list[Run]
    crc32: int | None = None


class WritePart(msgspec.Struct, frozen=True, array_like=True, tag="part"):
    """Announces data messages `first_sequence`, `first_sequence + 1`, … of a write."""

    write_id: int
    ticket_id: TicketId
    attempt: int
    receiver_incarnation: Incarnation
    write_seq: int
    first_sequence: int
    messages: list[DataMessage]
    is_last: bool


class OfferPool(msgspec.Struct, frozen=True, array_like=True, tag="offer"):
    """The sender's whole pool, for reading; the description is its region's own."""

    exported: bytes


class PoolMapped(msgspec.Struct, frozen=True, array_like=True, tag="mapped"):
    """The answer to `OfferPool`."""

    is_mapped: bool


class ReadPart(msgspec.Struct, frozen=True, array_like=True, tag="read"):
    """Blocks to copy from the sender's pool; `pack_block_ids` made the lists."""

    write_id: int
    ticket_id: TicketId
    attempt: int
    receiver_incarnation: Incarnation
    write_seq: int
    src_blocks: bytes
    dst_blocks: bytes
    is_last: bool
    crc32: int | None = None


class WithdrawWrite(msgspec.Struct, frozen=True, array_like=True, tag="withdraw"):
    """The sender gives a write of `ReadPart`s up; it's answered when nothing is read any more."""

    write_id: int


class WriteDone(msgspec.Struct, frozen=True, array_like=True, tag="done"):
    """All bytes of the write are in place and its owner was notified."""

    write_id: int


class WriteRefused(msgspec.Struct, frozen=True, array_like=True, tag="refused"):
    """The fence, or a failed receive, stopped the write; its ticket can't be completed by it."""

    write_id: int
    reason: str


class ProbeStart(msgspec.Struct, frozen=True, array_like=True, tag="probe"):
    """Announces one data message that the receiver takes into scratch memory."""

    probe_id: int
    sequence: int
    is_last: bool


class ProbeDone(msgspec.Struct, frozen=True, array_like=True, tag="probed"):
    """`receive_s` is the time from taking the message to having its bytes."""

    probe_id: int
    receive_s: float


class ProbeRead(msgspec.Struct, frozen=True, array_like=True, tag="probe_read"):
    """Asks the receiver to read blocks of the sender's pool, and throw them away."""

    probe_id: int
    num_blocks: int


AgentMessage: TypeAlias = (
    WritePart
    | WriteDone
    | WriteRefused
    | OfferPool
    | PoolMapped
    | ReadPart
    | WithdrawWrite
    | ProbeStart
    | ProbeRead
    | ProbeDone
)

_encoder = msgspec.msgpack.Encoder()
_message_decoder = msgspec.msgpack.Decoder[AgentMessage](AgentMessage)
_metadata_decoder = msgspec.msgpack.Decoder(AgentMetadata)


def encode(message: AgentMessage | AgentMetadata) -> bytearray:
    """A writable buffer, because transports want one."""
    return bytearray(_encoder.encode(message))


def decode_message(data: bytes | bytearray) -> AgentMessage:
    """Raises TransferError on anything but a well-formed message."""
    try:
        return decode(_message_decoder, data)
    except UnreadableError as error:
        raise TransferError(f"Unreadable transfer message: {error}") from error


def decode_metadata(data: bytes) -> AgentMetadata:
    """Raises TransferError on anything but well-formed metadata of our protocol version."""
    try:
        metadata = decode(_metadata_decoder, data)
    except UnreadableError as error:
        raise TransferError(f"Unreadable transfer agent metadata: {error}") from error
    if metadata.protocol_version != AGENT_PROTOCOL_VERSION:
        raise TransferError(
            f"Worker {metadata.worker_id} speaks transfer protocol {metadata.protocol_version}, "
            f"this worker {AGENT_PROTOCOL_VERSION}."
        )
    return metadata
