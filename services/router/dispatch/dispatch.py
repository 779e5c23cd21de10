"""Sends requests to workers and delivers their tokens, each exactly once, whatever dies meanwhile.

The life of a flight (one sequence on its way through the workers):

1. `start`: the prompt's blocks are hashed and a route is chosen. Without one the flight waits.
2. `RunPrefill` and `ExpectRequest`, or `RunLocal`, leave under attempt 1; `RunPrefill` alone if one
   token is all that is wanted.
3. Outputs come, from two workers and so in any order; they're put in order by their position.
4. A worker of the route is lost, or gives the request up: attempt n+1 takes another route, with
   the tokens delivered so far as part of its prompt. Older attempts' messages find no flight.
5. It ends with its last token, with `abort`, or with an error after too many attempts or too
   long a time without any worker.
"""

import asyncio
import logging
from collections.abc import Callable, Sequence

from protocol.block_hash import BlockHash
from protocol.errors import (
    InvalidRequestError,
    OverloadedError,
    ServiceUnavailableError,
    TandemError,
    WorkerLostError,
)
from protocol.ids import RequestKey, WorkerRef
from protocol.messages import (
    AbortRequest,
    ExpectRequest,
    RequestFailed,
    RunLocal,
    RunPrefill,
    StepOutputs,
)
from protocol.request import Request, SequenceOutput
from services.router.dispatch.flight import (
    Flight,
    OutputSink,
    RetryPolicy,
    RouteChooser,
    without_first,
)
from services.router.http.errors import RequestRefusedError
from services.runtime.peers import Peer

logger = logging.getLogger(__name__)


class Dispatcher:
    """All flights of one router. Everything happens in the event loop's thread."""

    def __init__(
        self,
        chooser: RouteChooser,
        connect: Callable[[WorkerRef], Peer],
        *,
        policy: RetryPolicy | None = None,
    ) -> None:
        """`connect` gives the connection to a worker, without waiting for it.

        `policy` may be replaced at any time; it's read when a flight fails.
        """
        self._chooser = chooser
        self._connect = connect
        self.policy = policy or RetryPolicy()
        self._loop = asyncio.get_running_loop()
        self._flights: dict[RequestKey, Flight] = {}
        self._homeless: dict[Flight, float] = {}

    @property
    def num_flights(self) -> int:
        return len(self._flights) + len(self._homeless)

    @property
    def flights(self) -> list[Flight]:
        """Those under way on workers."""
        return list(self._flights.values())

    def start(
        self, request: Request, sink: OutputSink, *, hashes: Sequence[BlockHash] = ()
    ) -> Flight:
        """Starts a request whose key names attempt 1; `hashes` of its blocks, as far as known.

        The sink may be called before this returns to the event loop's next turn, but never
        inside of this call. Raises OverloadedError.
        """
        assert request.key.attempt == 1
        hashes = self._chooser.block_hashes(request, hashes)
        flight = Flight(request, sink, hashes)
        if not self._take_off(flight):
            self._wait_for_route(flight, self._loop.time() + self.policy.no_worker_s)
        return flight

    def abort(self, flight: Flight) -> None:
        """Ends the flight and frees what it holds on its workers. The sink isn't called again."""
        if not flight.is_done:
            self._abort_attempt(flight)
            self._finish(flight)

    def outputs_came(self, peer: Peer, message: StepOutputs) -> None:
        flights = self._flights
        for output in message.outputs:
            flight = flights.get(output.key)
            if flight is None:
                continue  # aborted, or an older attempt's
            if peer is flight.decode:
                flight.decode_spoke = True
            self._arrange(flight, output)

    def request_failed(self, peer: Peer, message: RequestFailed) -> None:
        flight = self._flights.get(message.key)
        if flight is None:
            return
        if not message.retryable:
            self._abort_attempt(flight)
            self._fail(flight, _refusal(message))
            return
        self._try_again(flight, f"{peer.peer_id}: {message.message}", avoid=peer)

    def peer_lost(self, peer: Peer) -> None:
        for flight in list(self._flights.values()):
            # What prefill owed is paid once decode has spoken behind the first token.
            needs_prefill = not flight.decode_spoke or flight.ahead
            if flight.decode is peer or (flight.prefill is peer and needs_prefill):
                self._try_again(flight, f"worker {peer.peer_id} was lost", avoid=peer)

    def close(self) -> None:
        """Aborts everything."""
        for flight in [*self._flights.values(), *self._homeless]:
            self.abort(flight)

    def _take_off(self, flight: Flight) -> bool:
        """False if there's no route for it now. Raises OverloadedError."""
        request = flight.attempt_request()
        route = self._chooser.choose(request, flight.hashes, avoid=frozenset(flight.avoid))
        if route is None:
            return False
        flight.route = route
        flight.decode_spoke = False
        flight.ahead.clear()
        self._flights[request.key] = flight
        flight.decode = flight.prefill = None
        if route.prefill is None:
            flight.decode = self._connect(route.decode)
            flight.decode.send(RunLocal(request))
            return True
        flight.prefill = self._connect(route.prefill)
        if request.ends_with_prefill:
            flight.prefill.send(RunPrefill(request, None))
            return True
        flight.prefill.send(RunPrefill(request, route.decode))
        flight.decode = self._connect(route.decode)
        flight.decode.send(ExpectRequest(request, route.prefill))
        return True

    def _arrange(self, flight: Flight, output: SequenceOutput) -> None:
        """Delivers `output` and what waited for it, or keeps it until its turn."""
        pending: SequenceOutput | None = output
        while pending is not None and not flight.is_done:
            num_known = len(flight.tokens)
            if pending.position > num_known:
                flight.ahead[pending.position] = pending
                return
            if pending.position < num_known:
                pending = without_first(pending, num_known - pending.position)
            if pending is not None:
                self._deliver(flight, pending)
            pending = flight.ahead.pop(len(flight.tokens), None)

    def _deliver(self, flight: Flight, output: SequenceOutput) -> None:
        if flight.timer is not None:
            flight.timer.cancel()
            flight.timer = None
        if not flight.tokens:
            self._chooser.prefilled(flight.key)
        flight.tokens += output.token_ids
        if output.finish_reason is not None:
            self._finish(flight)
        flight.sink.deliver(output)

    def _try_again(self, flight: Flight, reason: str, *, avoid: Peer) -> None:
        self._abort_attempt(flight)
        self._forget_attempt(flight)
        flight.avoid.add(avoid.peer_id)
        if flight.attempt >= self.policy.max_attempts:
            self._fail(
                flight, WorkerLostError(f"The request failed {flight.attempt} times: {reason}.")
            )
            return
        logger.warning(
            "request %s, attempt %d failed (%s); trying again behind token %d",
            flight.request.key.request_id,
            flight.attempt,
            reason,
            len(flight.tokens),
        )
        flight.attempt += 1
        flight.num_retries += 1
        if flight.timer is None:
            flight.timer = self._loop.call_later(self.policy.give_up_s, self._give_up, flight)
        flight.hashes = self._chooser.block_hashes(flight.attempt_request(), flight.hashes)
        self._wait_for_route(flight, self._loop.time() + self.policy.give_up_s)

    def _give_up(self, flight: Flight) -> None:
        self._abort_attempt(flight)
        self._fail(flight, WorkerLostError("A worker was lost, and no other took over in time."))

    def _wait_for_route(self, flight: Flight, deadline_s: float) -> None:
        self._homeless[flight] = deadline_s
        if flight.attempt == 2:
            # Not at once: whoever reports a loss may go on to report the next one.
            self._loop.call_soon(self._look_for_route, flight)
        else:
            delay_s = self.policy.poll_s * 4 ** max(0, flight.attempt - 2)
            self._loop.call_later(delay_s, self._look_for_route, flight)

    def _look_for_route(self, flight: Flight) -> None:
        deadline_s = self._homeless.get(flight)
        if deadline_s is None:
            return
        try:
            if self._take_off(flight):
                del self._homeless[flight]
            elif self._loop.time() >= deadline_s:
                self._fail(flight, _no_worker(flight))
            else:
                self._loop.call_later(self.policy.poll_s, self._look_for_route, flight)
        except OverloadedError as error:
            self._fail(flight, error)

    def _abort_attempt(self, flight: Flight) -> None:
        message = AbortRequest(flight.key)
        for peer in (flight.prefill, flight.decode):
            if peer is not None:
                peer.send(message)

    def _forget_attempt(self, flight: Flight) -> None:
        if self._flights.pop(flight.key, None) is not None:
            self._chooser.ended(flight.key)
        flight.decode = flight.prefill = None

    def _finish(self, flight: Flight) -> None:
        flight.is_done = True
        self._homeless.pop(flight, None)
        self._forget_attempt(flight)
        if flight.timer is not None:
            flight.timer.cancel()
            flight.timer = None

    def _fail(self, flight: Flight, error: TandemError) -> None:
        self._finish(flight)
        flight.sink.fail(error)


def _refusal(message: RequestFailed) -> TandemError:
    if message.field is None:
        return RequestRefusedError(message.message)
    return InvalidRequestError(message.message, field=message.field, code="output_failed")


def _no_worker(flight: Flight) -> TandemError:
    if flight.attempt > 1:
        return WorkerLostError("A worker was lost, and there is no other.")
    return ServiceUnavailableError("No worker is available.")
