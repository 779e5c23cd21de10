"""Control channels over real sockets."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import msgspec
import pytest
import zmq
from channel_stack import PATIENCE_S, Stack
from unreadable import MARK, NESTED_MSGPACK, without_utf8

from protocol.errors import ProtocolMismatchError, StartupError, WorkerLostError
from protocol.ids import RequestKey, WorkerRef
from protocol.messages import PROTOCOL_VERSION, AbortRequest, Hello
from services.runtime.peers import (
    LostReason,
    PeerDown,
    PeerState,
    PeerUp,
    Received,
)
from services.runtime.wire import GOODBYE_PAYLOAD


@pytest.fixture
async def stack() -> AsyncIterator[Stack]:
    async with Stack() as stack:
        yield stack


@pytest.fixture
def dealer() -> Iterator[zmq.Socket[bytes]]:
    """A peer made by hand, that greets when told to and otherwise says nothing."""
    with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
        socket.linger = 0
        yield socket


def greet(dealer: zmq.Socket[bytes], ref: WorkerRef) -> None:
    dealer.connect(ref.control_address)
    dealer.send(msgspec.msgpack.encode(Hello(PROTOCOL_VERSION, "router-x", 1)))


def abort(number: int) -> AbortRequest:
    return AbortRequest(RequestKey(f"request-{number}", 0))


async def test_messages_go_both_ways_in_order(stack: Stack) -> None:
    worker, ref = stack.worker()
    router = stack.end("router-a")
    peer = router.channel.connect(ref)
    sent = [abort(number) for number in range(2000)]
    for message in sent:
        assert peer.send(message)
    await worker.events.wait_for(lambda event: event == Received(event.peer, sent[-1]))
    assert worker.events.messages == sent

    back = worker.channel.peer("router-a")
    assert back is not None
    for message in sent:
        back.send(message)
    await router.events.wait_for(lambda event: event == Received(peer, sent[-1]))
    assert router.events.messages == sent
    assert isinstance(router.events.events[0], PeerUp)
    assert isinstance(worker.events.events[0], PeerUp)


async def test_connect_gives_one_connection_an_incarnation(stack: Stack) -> None:
    _, ref = stack.worker()
    router = stack.end("router-a")
    peer = await router.channel.connected(ref)
    assert router.channel.connect(ref) is peer
    assert router.channel.peers == [peer]
    assert peer.state is PeerState.ALIVE


async def test_a_worker_may_start_after_its_router(stack: Stack, tmp_path: Path) -> None:
    address = f"ipc://{tmp_path}/control"
    router = stack.end("router-a", connect_timeout_s=PATIENCE_S)
    peer = router.channel.connect(WorkerRef("decode-0", 7, address))
    peer.send(abort(0))
    worker = stack.end("decode-0", 7)
    worker.channel.listen(address)
    await worker.events.wait_for(lambda event: isinstance(event, Received))


async def test_goodbye_comes_behind_the_last_message(stack: Stack) -> None:
    worker, ref = stack.worker()
    router = stack.end("router-a")
    peer = await router.channel.connected(ref)
    await worker.events.up()
    back = worker.channel.peer("router-a")
    assert back is not None
    for number in range(1000):
        back.send(abort(number))
    await worker.channel.close()
    down = await router.events.down()
    assert down.reason is LostReason.GOODBYE
    assert len(router.events.messages) == 1000
    assert not peer.send(abort(0))


async def test_both_sides_name_a_protocol_mismatch(
    stack: Stack, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker, ref = stack.worker()
    router = stack.end("router-a")
    monkeypatch.setattr("services.runtime.control_client.PROTOCOL_VERSION", PROTOCOL_VERSION + 1)
    ours, theirs = PROTOCOL_VERSION + 1, PROTOCOL_VERSION
    with pytest.raises(
        ProtocolMismatchError, match=rf"decode-0 .*version {theirs}, this process {ours}"
    ):
        await router.channel.connected(ref)
    assert (await router.events.down()).reason is LostReason.OTHER_PROTOCOL
    refusal = f"refused router-a: it speaks protocol version {ours}, this process {theirs}"
    assert refusal in caplog.text
    assert worker.events.events == []


async def test_another_incarnation_at_the_address_is_not_spoken_to(stack: Stack) -> None:
    worker, ref = stack.worker(incarnation=8)
    router = stack.end("router-a")
    stale = WorkerRef(ref.worker_id, 7, ref.control_address)
    peer = router.channel.connect(stale)
    peer.send(abort(0))
    assert (await router.events.down()).reason is LostReason.OTHER_INCARNATION
    fresh = await router.channel.connected(ref)
    fresh.send(abort(1))
    await worker.events.wait_for(lambda event: isinstance(event, Received))
    assert worker.events.messages == [abort(1)]


async def test_nobody_at_the_address(stack: Stack, tmp_path: Path) -> None:
    router = stack.end("router-a", connect_timeout_s=0.3)
    with pytest.raises(WorkerLostError, match="unreachable"):
        await router.channel.connected(WorkerRef("decode-0", 1, f"ipc://{tmp_path}/nobody"))
    assert router.channel.peers == []


async def test_an_address_in_use_is_a_startup_error(stack: Stack) -> None:
    _, ref = stack.worker()
    with pytest.raises(StartupError, match="cannot listen on tcp://"):
        stack.end("decode-1").channel.listen(ref.control_address)


async def test_a_new_connection_supersedes_the_old_one(stack: Stack) -> None:
    worker, ref = stack.worker()
    old = stack.end("router-a", incarnation=1)
    await old.channel.connected(ref)
    new = stack.end("router-a", incarnation=2)
    await new.channel.connected(ref)
    down = await worker.events.down()
    assert (down.reason, down.peer.incarnation) == (LostReason.SUPERSEDED, 1)
    assert [type(event) for event in worker.events.events] == [PeerUp, PeerDown, PeerUp]
    assert (await old.events.down()).reason is LostReason.GOODBYE
    current = worker.channel.peer("router-a")
    assert current is not None
    assert current.incarnation == 2


UNREADABLE = [
    b"\xc1 no msgpack",
    without_utf8(msgspec.msgpack.encode(AbortRequest(RequestKey(MARK, 0)))),
    NESTED_MSGPACK,
]


@pytest.mark.parametrize("payload", UNREADABLE, ids=["no msgpack", "no utf-8", "nested"])
async def test_unreadable_messages_end_the_connection(
    stack: Stack, dealer: zmq.Socket[bytes], payload: bytes
) -> None:
    worker, ref = stack.worker()
    greet(dealer, ref)
    await worker.events.up()
    dealer.send(payload)
    assert (await worker.events.down()).reason is LostReason.UNREADABLE


@pytest.mark.parametrize("payload", UNREADABLE, ids=["no msgpack", "no utf-8", "nested"])
async def test_a_worker_that_sends_unreadable_messages_is_lost(
    stack: Stack, payload: bytes
) -> None:
    router = stack.end("router-a")
    with zmq.Context() as context, context.socket(zmq.ROUTER) as worker:
        worker.linger = 0
        port = worker.bind_to_random_port("tcp://127.0.0.1")
        router.channel.connect(WorkerRef("decode-0", 7, f"tcp://127.0.0.1:{port}"))
        route, _ = await asyncio.to_thread(worker.recv_multipart)
        hello = msgspec.msgpack.encode(Hello(PROTOCOL_VERSION, "decode-0", 7))
        worker.send_multipart([route, hello])
        await router.events.up()
        worker.send_multipart([route, payload])
        assert (await router.events.down()).reason is LostReason.UNREADABLE


@pytest.mark.parametrize("payload", UNREADABLE, ids=["no msgpack", "no utf-8", "nested"])
async def test_strangers_unreadable_messages_are_dropped_in_a_line(
    stack: Stack,
    dealer: zmq.Socket[bytes],
    caplog: pytest.LogCaptureFixture,
    payload: bytes,
) -> None:
    worker, ref = stack.worker()
    dealer.connect(ref.control_address)
    dealer.send(payload)
    dealer.send(msgspec.msgpack.encode(Hello(PROTOCOL_VERSION, "router-x", 1)))
    await worker.events.up()
    [logged] = caplog.messages
    assert logged.startswith("unreadable message from an unknown peer: ")


async def test_a_peer_that_takes_no_messages_is_lost(
    stack: Stack, dealer: zmq.Socket[bytes]
) -> None:
    worker, ref = stack.worker(send_queue_messages=64)
    dealer.setsockopt(zmq.RCVHWM, 1)
    greet(dealer, ref)
    peer = await worker.events.up()
    large = AbortRequest(RequestKey("x" * 1_000_000, 0))
    num_sent = 0
    while peer.send(large):
        num_sent += 1
        assert num_sent < 1000, "the queue has no bound"
        await asyncio.sleep(0)
    assert (await worker.events.down()).reason is LostReason.OVERFLOW


async def test_a_silent_peer_is_suspect_before_it_is_lost(
    stack: Stack, dealer: zmq.Socket[bytes]
) -> None:
    worker, ref = stack.worker(heartbeat_interval_s=0.02, suspect_after_s=0.1, lost_after_s=0.5)
    greet(dealer, ref)
    peer = await worker.events.up()
    async with asyncio.timeout(PATIENCE_S):
        while peer.state is not PeerState.SUSPECT:  # noqa: ASYNC110  (a state, not an event)
            await asyncio.sleep(0.01)
        # A word heals it; a second Hello is only that.
        dealer.send(msgspec.msgpack.encode(Hello(PROTOCOL_VERSION, "router-x", 1)))
        while peer.state is not PeerState.ALIVE:  # noqa: ASYNC110
            await asyncio.sleep(0)
    down = await worker.events.down()
    assert down.reason is LostReason.SILENT
    received = [b""]
    while received[-1] != GOODBYE_PAYLOAD:
        assert dealer.poll(1000 * PATIENCE_S), "it isn't told that it was given up"
        received.append(dealer.recv())


async def test_a_closing_channel_tells_nothing_and_connects_to_nobody(stack: Stack) -> None:
    _, ref = stack.worker()
    router = stack.end("router-a")
    await router.channel.connected(ref)
    closing = asyncio.create_task(router.channel.close())
    await asyncio.sleep(0)
    assert router.channel.connect(ref).is_lost
    await closing
    assert not router.channel.connect(ref).send(abort(0))
    with pytest.raises(WorkerLostError, match="closing"):
        await router.channel.connected(ref)
    assert [type(event) for event in router.events.events] == [PeerUp]
