"""A flight: one sequence on its way through the workers, and what is around it."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import msgspec

from protocol.block_hash import BlockHash
from protocol.errors import TandemError
from protocol.ids import RequestKey, WorkerId, WorkerRef
from protocol.request import Request, SequenceOutput
from services.runtime.peers import Peer


class Route(msgspec.Struct, frozen=True):
    """Where one attempt runs; without `prefill`, decode prefills locally."""

    decode: WorkerRef
    prefill: WorkerRef | None
    num_cached_tokens: int


class RouteChooser(Protocol):
    """Decides where requests go, and keeps account of what is where."""

    def block_hashes(self, request: Request, known: Sequence[BlockHash]) -> list[BlockHash]:
        """Hashes of the full blocks of `request.token_ids`; `known` are the first of them."""
        ...

    def choose(
        self, request: Request, hashes: Sequence[BlockHash], *, avoid: frozenset[WorkerId]
    ) -> Route | None:
        """None if no worker can take it now; `avoid` are workers to take only if there's no other.

        Raises OverloadedError if it shouldn't wait either.
        """
        ...

    def prefilled(self, key: RequestKey) -> None:
        """The attempt's first token is there."""
        ...

    def ended(self, key: RequestKey) -> None:
        """The attempt is over."""
        ...


class OutputSink(Protocol):
    """Who asked for a sequence. Called in the event loop, must not block."""

    def deliver(self, output: SequenceOutput) -> None:
        """The next tokens: positions without gap or repetition, the last with a finish reason."""
        ...

    def fail(self, error: TandemError) -> None:
        """Nothing more comes."""
        ...


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """`no_worker_s` bounds how long a flight is without any route, `give_up_s` the time from an
    attempt's failure to the next one's first token; a lone worker restarts in less."""

    max_attempts: int = 4
    poll_s: float = 0.05
    no_worker_s: float = 3.0
    give_up_s: float = 4.0


class Flight(msgspec.Struct, eq=False):
    """One sequence under way. The dispatcher's; for reading only elsewhere."""

    request: Request
    sink: OutputSink
    hashes: list[BlockHash]
    attempt: int = 1
    is_done: bool = False
    route: Route | None = None
    num_retries: int = 0
    tokens: list[int] = []
    decode: Peer | None = None
    prefill: Peer | None = None
    decode_spoke: bool = False
    ahead: dict[int, SequenceOutput] = {}
    avoid: set[WorkerId] = set()
    timer: asyncio.TimerHandle | None = None

    @property
    def key(self) -> RequestKey:
        return RequestKey(self.request.key.request_id, self.attempt)

    def attempt_request(self) -> Request:
        """The request as this attempt sends it."""
        if not self.tokens and self.attempt == self.request.key.attempt:
            return self.request
        return msgspec.structs.replace(
            self.request, key=self.key, token_ids=self.request.token_ids + self.tokens
        )


def without_first(output: SequenceOutput, num_known: int) -> SequenceOutput | None:
    """The rest of an output whose first tokens were delivered already, None if nothing is new."""
    if num_known >= len(output.token_ids):
        return None
    logprobs = None if output.logprobs is None else output.logprobs[num_known:]
    return msgspec.structs.replace(
        output,
        position=output.position + num_known,
        token_ids=output.token_ids[num_known:],
        logprobs=logprobs,
    )
