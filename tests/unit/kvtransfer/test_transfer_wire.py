"""Tags, control messages and metadata."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtransfer.block_ids import pack_block_ids, to_block_ids, unpack_block_ids
from kvtransfer.host import host_identity
from kvtransfer.plan import (
    MAX_BLOCKS_PER_READ,
    MAX_PER_PART,
    MAX_RUNS_PER_MESSAGE,
    MAX_RUNS_PER_PART,
)
from kvtransfer.tags import MessageKind, Tag, new_namespace, pack_tag, unpack_tag
from kvtransfer.ucx import DEVICE_MEMORY_SETTINGS
from kvtransfer.wire import (
    MAX_CONTROL_BYTES,
    MAX_HEADER_BYTES,
    AgentMetadata,
    DataMessage,
    ReadPart,
    WriteDone,
    WritePart,
    decode_message,
    decode_metadata,
    encode,
)
from protocol.errors import TransferError

BIG = 2**31 - 1
BLOCK_IDS = st.integers(0, 2**32 - 1)


@pytest.mark.parametrize("kind", MessageKind)
def test_tags_keep_their_parts(kind: MessageKind):
    tag = Tag(new_namespace(), kind, 2**28 - 1)
    assert unpack_tag(pack_tag(tag)) == tag


def test_tag_layout():
    assert pack_tag(Tag(1, MessageKind.DATA, 2)) == 1 << 30 | 1 << 28 | 2
    assert unpack_tag(3 << 28) is None


@pytest.mark.parametrize(
    ("num_messages", "runs_each"),
    [
        (MAX_RUNS_PER_PART // MAX_RUNS_PER_MESSAGE, MAX_RUNS_PER_MESSAGE),
        (MAX_PER_PART, MAX_RUNS_PER_PART // MAX_PER_PART),
    ],
)
def test_the_largest_header_fits(num_messages: int, runs_each: int):
    messages = [DataMessage([(BIG, BIG)] * runs_each, BIG) for _ in range(num_messages)]
    part = WritePart(2**60, 2**60, BIG, 2**62, BIG, BIG, messages, is_last=True)
    data = encode(part)
    assert len(data) <= MAX_HEADER_BYTES
    assert decode_message(data) == part


def test_unreadable_messages_are_refused():
    with pytest.raises(TransferError):
        decode_message(b"\x93\xa4nope\x01\x02")
    with pytest.raises(TransferError):
        decode_message(encode(WriteDone(1))[:-1])
    with pytest.raises(TransferError):
        decode_message(b"\x92\xa4d\xffne\x01")
    with pytest.raises(TransferError):
        decode_message(b"\x93\xa4done\x01" + b"\x91" * 30_000 + b"\xc0")


def metadata(protocol_version: int) -> AgentMetadata:
    return AgentMetadata(
        protocol_version=protocol_version,
        transport="ucx",
        worker_id="p0",
        incarnation=5,
        block_bytes=64,
        tag_namespace=7,
        address=b"where",
        host=host_identity(),
    )


def test_metadata_of_another_version_names_both():
    assert decode_metadata(bytes(encode(metadata(3)))) == metadata(3)
    with pytest.raises(TransferError, match="Worker p0 speaks transfer protocol 2, this worker 3"):
        decode_metadata(bytes(encode(metadata(2))))


def test_the_largest_read_fits():
    ids = pack_block_ids(to_block_ids([2**32 - 1] * MAX_BLOCKS_PER_READ))
    part = ReadPart(2**60, 2**60, BIG, 2**62, BIG, ids, ids, is_last=True, crc32=BIG)
    data = encode(part)
    assert len(data) <= MAX_CONTROL_BYTES
    assert decode_message(data) == part


def test_reads_go_eagerly_between_processes_on_one_card():
    threshold = DEVICE_MEMORY_SETTINGS["RNDV_THRESH"]
    assert threshold.endswith("k")
    assert int(threshold[:-1]) << 10 > MAX_CONTROL_BYTES


@given(st.binary())
def test_any_bytes_are_a_message_or_refused(data: bytes):
    try:
        message = decode_message(data)
    except TransferError:
        return
    assert decode_message(encode(message)) == message


@given(st.data())
def test_broken_reads_are_read_or_refused(data: st.DataObject):
    """One byte more, less or other than a sound announcement has."""
    ids = pack_block_ids(to_block_ids(data.draw(st.lists(BLOCK_IDS, max_size=20))))
    sound = bytes(encode(ReadPart(1, 2, 3, 4, 5, ids, ids, is_last=True)))
    at = data.draw(st.integers(0, len(sound)))
    piece = data.draw(st.binary(max_size=1))
    try:
        message = decode_message(sound[:at] + piece + sound[at + data.draw(st.integers(0, 1)) :])
    except TransferError:
        return
    if isinstance(message, ReadPart):
        for packed in (message.src_blocks, message.dst_blocks):
            if len(packed) % 4:
                with pytest.raises(TransferError):
                    unpack_block_ids(packed)
            else:
                assert len(unpack_block_ids(packed)) == len(packed) // 4
