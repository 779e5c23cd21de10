"""Every message survives the wire, and what isn't one is refused."""

import msgspec
import pytest

from protocol.errors import LayoutMismatchError
from protocol.ids import RequestKey, WorkerRef, new_incarnation
from protocol.layout import KVLayout, check_layouts_match
from protocol.messages import (
    AbortRequest,
    ControlMessage,
    ExpectRequest,
    GrantTicket,
    PrefillDone,
    PrefixCacheReset,
    ResetPrefixCache,
    StepOutputs,
)
from protocol.request import PhaseTimings, Request, SequenceOutput, TokenLogprobs
from protocol.sampling import SamplingParams
from protocol.ticket import TransferTicket

KEY = RequestKey("cmpl-1", 2)
OUTPUT = SequenceOutput(
    key=KEY,
    position=0,
    token_ids=[7],
    logprobs=[TokenLogprobs(-0.5, 1, [7, 9], [-0.5, -1.5])],
    timings=PhaseTimings(prefill_s=0.25),
)
LAYOUT = KVLayout("m", 2, 3, 64, 16, "bfloat16")

MESSAGES = [
    AbortRequest(KEY),
    ExpectRequest(
        Request(
            key=KEY,
            token_ids=[1, 2, 3],
            num_prompt_tokens=3,
            sampling=SamplingParams(stop=("x",), logit_bias={5: -1.0}, seed=-3),
            cache_salt="tenant",
        ),
        WorkerRef("prefill-0", new_incarnation(), "tcp://127.0.0.1:5000"),
    ),
    GrantTicket(
        TransferTicket(
            ticket_id=4, key=KEY, incarnation=9, num_cached_blocks=1, block_ids=[3, 4], ttl_s=5.0
        )
    ),
    StepOutputs([OUTPUT]),
    ResetPrefixCache(new_incarnation()),
    PrefixCacheReset(new_incarnation(), 12),
    PrefillDone(KEY, 4, 2, OUTPUT, PhaseTimings(transfer_s=0.1)),
]


@pytest.mark.parametrize("message", MESSAGES, ids=lambda m: type(m).__name__)
def test_round_trip(message: ControlMessage) -> None:
    wire = msgspec.msgpack.encode(message)
    assert msgspec.msgpack.decode(wire, type=ControlMessage) == message


@pytest.mark.parametrize(
    "wire",
    [
        b"",
        b"\xc1",
        msgspec.msgpack.encode({"type": "no such message"}),
        msgspec.msgpack.encode({"type": "abort"}),
        msgspec.msgpack.encode({"type": "abort", "key": ["id", "not a number"]}),
    ],
)
def test_what_is_no_message_is_refused(wire: bytes) -> None:
    with pytest.raises(msgspec.DecodeError):
        msgspec.msgpack.decode(wire, type=ControlMessage)


def test_incarnations_fit_a_signed_64_bit_word_and_differ() -> None:
    drawn = {new_incarnation() for _ in range(100)}
    assert len(drawn) == 100
    assert all(0 < value < 2**63 for value in drawn)


def test_a_layout_mismatch_names_both_sides() -> None:
    other = msgspec.structs.replace(LAYOUT, block_size=32, dtype="float16")
    assert other.fingerprint != LAYOUT.fingerprint
    check_layouts_match(LAYOUT, LAYOUT, peer="decode-0")
    with pytest.raises(
        LayoutMismatchError, match="block_size is 16 here and 32 at decode-0; dtype"
    ):
        check_layouts_match(LAYOUT, other, peer="decode-0")


def test_a_block_holds_keys_and_values_of_all_layers() -> None:
    assert LAYOUT.block_bytes == 2 * 2 * 3 * 16 * 64 * 2
    assert LAYOUT.token_bytes * LAYOUT.block_size == LAYOUT.block_bytes
