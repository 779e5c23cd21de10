"""Real processes over UCX: whichever is killed or stopped, the other goes on."""

import itertools
import os
import signal
import time
from collections.abc import Iterator

import pytest
import torch
from transfer_process import BLOCK_BYTES, NUM_BLOCKS, Starter, TransferProcess

ALL_BLOCKS = list(range(NUM_BLOCKS))


def on_cards(name: str, *, sender: int, receiver: int) -> object:
    """A parameter of `start`."""
    num_missing = max(sender, receiver) + 1 - torch.cuda.device_count()
    skip = pytest.mark.skipif(num_missing > 0, reason=f"{num_missing} CUDA devices too few")
    memory = {"p": f"cuda:{sender}", "d": f"cuda:{receiver}"}
    return pytest.param(memory, marks=[pytest.mark.gpu, skip], id=name)


@pytest.fixture(
    params=[
        pytest.param({"p": "host", "d": "host"}, id="host"),
        on_cards("cuda", sender=0, receiver=0),
        on_cards("two_cards", sender=0, receiver=1),
    ]
)
def start(request: pytest.FixtureRequest) -> Iterator[Starter]:
    started: list[TransferProcess] = []
    incarnations = itertools.count(1)

    def start_process(worker_id: str) -> TransferProcess:
        memory = request.param[worker_id]
        process = TransferProcess.start(worker_id, next(incarnations), memory)
        started.append(process)
        return process

    yield start_process
    for process in started:
        process.stop()


def check_transfer(sender: TransferProcess, receiver: TransferProcess, *, ticket_id: int) -> None:
    """A fresh pair of pools, one write, the right bytes."""
    sender.call("fill", ticket_id)
    receiver.call("expect", ticket_id, sender.incarnation, ALL_BLOCKS)
    written = sender.call("write", receiver.incarnation, ticket_id, 0, ALL_BLOCKS)
    assert written == "written"
    assert receiver.call("holds", ticket_id, ALL_BLOCKS)
    receiver.call("close_ticket", ticket_id)


def wait_for_writes(receiver: TransferProcess, num_writes: int) -> None:
    deadline = time.monotonic() + 20
    while receiver.call("num_received") < num_writes:
        assert time.monotonic() < deadline, "no writes arrive"


def test_two_processes_of_one_host_reach_each_others_memory(start: Starter):
    sender, receiver = start("p"), start("d")
    sender.connect_to(receiver)
    assert sender.call("is_same_host", receiver.incarnation)
    check_transfer(sender, receiver, ticket_id=5)
    # Announcements only.
    assert 0 < sender.call("num_bytes_sent_over_tcp") < BLOCK_BYTES
    # A process that dies in a queue that others share would block them.
    queues = sender.call("shared_writable_memory") & receiver.call("shared_writable_memory")
    assert not queues
    sender.stop()
    receiver.stop()
    assert (sender.process.exitcode, receiver.process.exitcode) == (0, 0)


def test_kill_the_sender_amid_writes_and_reconnect(start: Starter):
    receiver = start("d")
    for ticket_id in range(1, 5):
        sender = start("p")
        sender.connect_to(receiver)
        receiver.call("expect", ticket_id, sender.incarnation, ALL_BLOCKS)
        num_before = receiver.call("num_received")
        sender.call("start_writing", receiver.incarnation, ticket_id)
        wait_for_writes(receiver, num_before + ticket_id)
        sender.kill()
        # The receiver may go on for a while before it's told.
        assert receiver.call("num_received") >= ticket_id
        receiver.call("drop", "p", sender.incarnation)
        receiver.call("close_ticket", ticket_id)
    survivor = start("p")
    survivor.connect_to(receiver)
    check_transfer(survivor, receiver, ticket_id=99)


def test_kill_the_receiver_amid_writes_and_reconnect(start: Starter):
    sender = start("p")
    for num_writes in range(1, 5):
        receiver = start("d")
        sender.connect_to(receiver)
        receiver.call("expect", 1, sender.incarnation, ALL_BLOCKS)
        receiver.call("die_after", num_writes)
        sender.call("start_writing", receiver.incarnation, 1)
        receiver.process.join(20)
        assert receiver.process.exitcode == -signal.SIGKILL
        assert sender.call("drop", "d", receiver.incarnation) == []
        assert sender.call("end_of_writing") in ("TransferCancelledError", "TransferError")
    successor = start("d")
    sender.connect_to(successor)
    check_transfer(sender, successor, ticket_id=99)


def test_a_stopped_sender_that_was_dropped_writes_nothing_later(start: Starter):
    sender, receiver = start("p"), start("d")
    sender.connect_to(receiver)
    receiver.call("expect", 1, sender.incarnation, ALL_BLOCKS)
    sender.call("start_writing", receiver.incarnation, 1)
    wait_for_writes(receiver, 2)
    assert sender.process.pid is not None
    os.kill(sender.process.pid, signal.SIGSTOP)

    assert receiver.call("drop", "p", sender.incarnation) == []
    receiver.call("close_ticket", 1)
    receiver.call("fill", 200)
    successor = start("p")
    successor.connect_to(receiver)
    os.kill(sender.process.pid, signal.SIGCONT)
    check_transfer(successor, receiver, ticket_id=2)

    receiver.call("fill", 200)
    assert sender.call("drop", "d", receiver.incarnation) == []
    assert sender.call("end_of_writing") == "TransferCancelledError"
    assert receiver.call("holds", 200, ALL_BLOCKS)


def test_a_stopped_receiver_is_dropped_without_waiting_for_it(start: Starter):
    sender, receiver = start("p"), start("d")
    sender.connect_to(receiver)
    receiver.call("expect", 1, sender.incarnation, ALL_BLOCKS)
    sender.call("start_writing", receiver.incarnation, 1)
    wait_for_writes(receiver, 2)
    assert receiver.process.pid is not None
    os.kill(receiver.process.pid, signal.SIGSTOP)
    assert sender.call("drop", "d", receiver.incarnation) == []
    assert sender.call("end_of_writing") == "TransferCancelledError"
    successor = start("d")
    sender.connect_to(successor)
    check_transfer(sender, successor, ticket_id=2)
