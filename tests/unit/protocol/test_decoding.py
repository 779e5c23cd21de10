"""Whatever bytes come, they are a message or refused with one error."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from unreadable import MARK, NESTED_JSON, NESTED_MSGPACK, without_utf8

from protocol.decoding import decode
from protocol.errors import UnreadableError
from protocol.ids import RequestKey
from protocol.messages import AbortRequest, ControlMessage
from protocol.records import WorkerLoad

MESSAGES = msgspec.msgpack.Decoder[ControlMessage](ControlMessage)
LOADS = msgspec.json.Decoder(WorkerLoad)
ABORT = msgspec.msgpack.encode(AbortRequest(RequestKey(MARK, 1)))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xc1",
        ABORT[:-1],
        ABORT + b"\x00",
        msgspec.msgpack.encode({"type": "abort"}),
        without_utf8(ABORT),
        NESTED_MSGPACK,
    ],
)
def test_what_is_no_message_has_one_error(data: bytes) -> None:
    with pytest.raises(UnreadableError):
        decode(MESSAGES, data)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b'{"num_running": "1"}',
        b'{"num_running": 1e999}',
        b'{"num_running": ' + b"9" * 10_000 + b"}",
        b'{"transfer_gb_per_s": {"\xff": 1}}',
        b'{"transfer_gb_per_s": {"\\ud800": 1}}',
        NESTED_JSON,
    ],
)
def test_what_is_no_json_of_its_kind_has_one_error(data: bytes) -> None:
    with pytest.raises(UnreadableError):
        decode(LOADS, data)


def test_the_error_is_one_line_that_has_an_end() -> None:
    with pytest.raises(UnreadableError) as refused:
        decode(MESSAGES, msgspec.msgpack.encode({"type": "no\nsuch " + "message" * 1000}))
    assert str(refused.value).startswith("Invalid value 'no such message")
    assert len(str(refused.value)) <= 300
    assert isinstance(refused.value.__cause__, msgspec.ValidationError)


@given(st.data())
def test_broken_messages_are_read_or_refused(data: st.DataObject) -> None:
    at = data.draw(st.integers(0, len(ABORT)))
    end = data.draw(st.integers(at, min(at + 3, len(ABORT))))
    broken = ABORT[:at] + data.draw(st.binary(max_size=4)) + ABORT[end:]
    try:
        message = decode(MESSAGES, broken)
    except UnreadableError:
        return
    assert decode(MESSAGES, msgspec.msgpack.encode(message)) == message
