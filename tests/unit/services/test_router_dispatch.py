"""Flights deliver each token exactly once, whatever dies and in whatever order messages come."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
from router_stack import until

from protocol.errors import OverloadedError, ServiceUnavailableError, TandemError, WorkerLostError
from protocol.ids import RequestKey, WorkerId, WorkerRef
from protocol.messages import (
    AbortRequest,
    ControlMessage,
    ExpectRequest,
    RequestFailed,
    RunLocal,
    RunPrefill,
    StepOutputs,
)
from protocol.request import Request, SequenceOutput, TokenLogprobs
from protocol.sampling import SamplingParams
from services.router.dispatch.dispatch import Dispatcher
from services.router.dispatch.flight import Flight, RetryPolicy, Route
from services.router.http.errors import RequestRefusedError
from services.runtime.peers import Peer

D0, D1, P0 = (WorkerRef(name, 1, f"inproc://{name}") for name in ("d0", "d1", "p0"))
FAST = RetryPolicy(poll_s=0.001, no_worker_s=0.02, give_up_s=0.05)


class Sent:
    """A link that keeps what was sent."""

    def __init__(self) -> None:
        self.messages: list[ControlMessage] = []

    def transmit(self, peer: Peer, message: ControlMessage) -> None:
        self.messages.append(message)


@dataclass
class Sink:
    outputs: list[SequenceOutput] = field(default_factory=list)
    error: TandemError | None = None
    ended: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def token_ids(self) -> list[int]:
        return [token_id for output in self.outputs for token_id in output.token_ids]

    def deliver(self, output: SequenceOutput) -> None:
        self.outputs.append(output)
        if output.finish_reason is not None:
            self.ended.set()

    def fail(self, error: TandemError) -> None:
        assert self.error is None, "one error at most"
        self.error = error
        self.ended.set()


@dataclass
class Chooser:
    """Gives the routes one after another, then none."""

    routes: list[Route]
    asked: list[tuple[Request, frozenset[WorkerId]]] = field(default_factory=list)
    ended_keys: list[RequestKey] = field(default_factory=list)

    def block_hashes(self, request: Request, known: Sequence[bytes]) -> list[bytes]:
        return [bytes([i]) for i in range(len(request.token_ids) // 4)]

    def choose(
        self, request: Request, hashes: Sequence[bytes], *, avoid: frozenset[WorkerId]
    ) -> Route | None:
        if not self.routes:
            return None
        self.asked.append((request, avoid))
        return self.routes.pop(0)

    def prefilled(self, key: RequestKey) -> None: ...

    def ended(self, key: RequestKey) -> None:
        self.ended_keys.append(key)


class Harness:
    def __init__(self, *routes: Route, policy: RetryPolicy = FAST) -> None:
        self.chooser = Chooser(list(routes))
        self.links: dict[WorkerId, Sent] = {}
        self.peers: dict[WorkerId, Peer] = {}
        self.dispatcher = Dispatcher(self.chooser, self._connect, policy=policy)
        self.sink = Sink()

    def _connect(self, ref: WorkerRef) -> Peer:
        if ref.worker_id not in self.peers:
            link = self.links[ref.worker_id] = Sent()
            self.peers[ref.worker_id] = Peer(ref.worker_id, ref.incarnation, link=link)
        return self.peers[ref.worker_id]

    def start(self, num_prompt_tokens: int = 8) -> Flight:
        request = Request(
            key=RequestKey("r", 1),
            token_ids=list(range(num_prompt_tokens)),
            num_prompt_tokens=num_prompt_tokens,
            sampling=SamplingParams(max_tokens=10),
        )
        return self.dispatcher.start(request, self.sink)

    def outputs(self, worker: str, *outputs: SequenceOutput) -> None:
        self.dispatcher.outputs_came(self.peers[worker], StepOutputs(list(outputs)))

    def lose(self, worker: str) -> None:
        self.dispatcher.peer_lost(self.peers[worker])


def tokens(position: int, *token_ids: int, attempt: int = 1, **fields: Any) -> SequenceOutput:
    return SequenceOutput(RequestKey("r", attempt), position, list(token_ids), **fields)


def failure(attempt: int, *, retryable: bool = True) -> RequestFailed:
    return RequestFailed(RequestKey("r", attempt), "no room", retryable)


async def test_a_remote_route_tells_both_workers_of_each_other() -> None:
    harness = Harness(Route(D0, P0, 0))
    request = harness.start().request
    assert harness.links["p0"].messages == [RunPrefill(request, D0)]
    assert harness.links["d0"].messages == [ExpectRequest(request, P0)]


async def test_a_local_route_goes_to_decode_alone() -> None:
    harness = Harness(Route(D0, None, 0))
    request = harness.start().request
    assert harness.links["d0"].messages == [RunLocal(request)]


async def test_tokens_of_two_workers_are_put_in_order() -> None:
    harness = Harness(Route(D0, P0, 0))
    harness.start()
    harness.outputs("d0", tokens(3, 13, finish_reason="stop"))
    harness.outputs("d0", tokens(1, 11, 12))
    assert harness.sink.outputs == []
    harness.outputs("p0", tokens(0, 10))
    assert harness.sink.token_ids == [10, 11, 12, 13]
    assert harness.dispatcher.num_flights == 0


async def test_no_token_comes_twice() -> None:
    harness = Harness(Route(D0, None, 0))
    harness.start()
    logprobs = [TokenLogprobs(-float(i), 1, [], []) for i in range(3)]
    harness.outputs("d0", tokens(0, 10, 11), tokens(0, 10))
    harness.outputs("d0", tokens(0, 10, 11, 12, logprobs=logprobs))
    assert harness.sink.token_ids == [10, 11, 12]
    assert harness.sink.outputs[-1].logprobs == logprobs[2:]


async def test_a_lost_decode_worker_is_replaced_behind_the_tokens_delivered() -> None:
    harness = Harness(Route(D0, None, 0), Route(D1, None, 0))
    flight = harness.start(num_prompt_tokens=3)
    harness.outputs("d0", tokens(0, 10, 11))
    harness.lose("d0")
    await asyncio.sleep(0)
    [again] = harness.links["d1"].messages
    assert isinstance(again, RunLocal)
    assert again.request.key == RequestKey("r", 2)
    assert again.request.token_ids == [0, 1, 2, 10, 11]
    assert again.request.num_prompt_tokens == 3
    assert flight.num_retries == 1
    # What the dead one still had to say is void.
    harness.outputs("d0", tokens(2, 99))
    harness.outputs("d1", tokens(2, 12, attempt=2, finish_reason="stop"))
    assert harness.sink.token_ids == [10, 11, 12]
    assert harness.chooser.ended_keys == [RequestKey("r", 1), RequestKey("r", 2)]


async def test_the_failed_worker_is_avoided() -> None:
    harness = Harness(Route(D0, P0, 0), Route(D1, None, 0))
    harness.start()
    harness.lose("p0")
    await asyncio.sleep(0)
    assert harness.chooser.asked[1][1] == {"p0"}
    assert harness.links["d0"].messages[-1] == AbortRequest(RequestKey("r", 1))


@pytest.mark.parametrize(("from_decode", "retries"), [(True, 0), (False, 1)])
async def test_a_lost_prefill_worker_matters_until_decode_has_spoken(
    *, from_decode: bool, retries: int
) -> None:
    harness = Harness(Route(D0, P0, 0), Route(D1, None, 0))
    flight = harness.start()
    harness.outputs("p0", tokens(0, 10))
    if from_decode:
        harness.outputs("d0", tokens(1, 11))
    harness.lose("p0")
    assert flight.num_retries == retries


async def test_a_first_token_lost_with_its_prefill_worker_is_made_again() -> None:
    harness = Harness(Route(D0, P0, 0), Route(D1, None, 0))
    flight = harness.start()
    harness.outputs("d0", tokens(1, 11))
    harness.lose("p0")
    await asyncio.sleep(0)
    harness.outputs("d1", tokens(0, 10, 11, attempt=2))
    assert (flight.num_retries, harness.sink.token_ids) == (1, [10, 11])


async def test_a_retryable_failure_is_retried_and_a_final_one_is_not() -> None:
    harness = Harness(Route(D0, None, 0), Route(D0, None, 0))
    harness.start()
    d0 = harness.peers["d0"]
    harness.dispatcher.request_failed(d0, failure(1))
    await asyncio.sleep(0)
    harness.dispatcher.request_failed(d0, failure(2, retryable=False))
    assert isinstance(harness.sink.error, RequestRefusedError)
    assert harness.dispatcher.num_flights == 0


async def test_attempts_are_limited() -> None:
    harness = Harness(*[Route(D0, None, 0)] * 9)
    flight = harness.start()
    for _ in range(FAST.max_attempts):
        await until(lambda: flight.decode is not None)
        harness.dispatcher.request_failed(harness.peers["d0"], failure(flight.attempt))
    assert isinstance(harness.sink.error, WorkerLostError)
    assert len(harness.chooser.asked) == FAST.max_attempts


async def test_without_any_worker_the_client_hears_it_soon() -> None:
    harness = Harness()
    harness.start()
    await harness.sink.ended.wait()
    assert isinstance(harness.sink.error, ServiceUnavailableError)


async def test_without_another_worker_a_lost_request_fails() -> None:
    harness = Harness(Route(D0, None, 0))
    harness.start()
    harness.lose("d0")
    await harness.sink.ended.wait()
    assert isinstance(harness.sink.error, WorkerLostError)


async def test_a_second_attempt_that_says_nothing_is_given_up() -> None:
    harness = Harness(Route(D0, None, 0), Route(D1, None, 0))
    harness.start()
    harness.lose("d0")
    await harness.sink.ended.wait()
    assert isinstance(harness.sink.error, WorkerLostError)
    assert harness.links["d1"].messages[-1] == AbortRequest(RequestKey("r", 2))


async def test_a_worker_that_comes_late_is_used() -> None:
    harness = Harness(policy=RetryPolicy(poll_s=0.001))
    flight = harness.start()
    harness.chooser.routes.append(Route(D0, None, 0))
    await until(lambda: bool(harness.links))
    assert harness.links["d0"].messages == [RunLocal(flight.request)]
    harness.dispatcher.close()


async def test_an_abort_reaches_both_workers_and_nothing_is_delivered_after_it() -> None:
    harness = Harness(Route(D0, P0, 0))
    flight = harness.start()
    harness.dispatcher.abort(flight)
    harness.dispatcher.abort(flight)
    harness.outputs("p0", tokens(0, 10))
    for worker in ("d0", "p0"):
        assert harness.links[worker].messages[1:] == [AbortRequest(RequestKey("r", 1))]
    assert harness.sink == Sink(ended=harness.sink.ended)


async def test_an_abort_ends_the_wait_for_a_worker() -> None:
    harness = Harness()
    flight = harness.start()
    harness.dispatcher.abort(flight)
    assert harness.dispatcher.num_flights == 0
    await asyncio.sleep(FAST.no_worker_s)
    assert harness.sink.error is None


async def test_overload_is_refused_at_once() -> None:
    harness = Harness()

    def refuse(*args: Any, **kwargs: Any) -> Route | None:
        raise OverloadedError("the queue is full", retry_after_s=2.0)

    harness.chooser.choose = refuse  # type: ignore[method-assign]
    with pytest.raises(OverloadedError):
        harness.start()
    assert harness.dispatcher.num_flights == 0
