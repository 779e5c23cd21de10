"""One API request's outputs: `n` for each prompt, each a flight of its own."""

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import Protocol

import msgspec

from engine.tokenizer import Tokenizer
from protocol.block_hash import BlockHash
from protocol.errors import OverloadedError, TandemError
from protocol.ids import RequestKey
from protocol.pooling import PoolingParams
from protocol.request import (
    PhaseTimings,
    Request,
    SequenceOutput,
    TokenLogprobs,
)
from protocol.sampling import SamplingParams
from services.router.dispatch.choice import Choice, Watch
from services.router.dispatch.dispatch import Dispatcher
from services.router.dispatch.flight import Flight
from services.router.http.errors import RequestTimeoutError
from services.router.openai.chat_fields import renamed
from services.router.openai.prompts import Prompt


class GenerationSpec(msgspec.Struct, frozen=True):
    """What is asked for, validated. `max_tokens` are bounded for each prompt.

    Of each prompt's `sampling.n` outputs the best `num_returned` are answered, all if it's None.
    `is_prompt_only` throws the output away: the prompt itself is of interest. `structure_field` is
    where the client said what `sampling.structured_outputs` says. `make_watch` may end an output.
    """

    prompts: Sequence[Prompt]
    max_tokens: Sequence[int]
    sampling: SamplingParams
    cache_salt: str | None = None
    priority: int = 0
    num_returned: int | None = None
    pooling: PoolingParams | None = None
    is_prompt_only: bool = False
    structure_field: str = "structured_outputs"
    make_watch: Callable[[], Watch | None] = lambda: None

    @property
    def num_outputs(self) -> int:
        return len(self.prompts) * self.sampling.n


class TokenObserver(Protocol):
    """Hears when tokens come, for the metrics."""

    def first_token(self, ttft_s: float) -> None: ...

    def next_tokens(self, gap_s: float, num_tokens: int) -> None: ...


class Generation:
    """Runs a spec. Await `news` or `finished`, then read `outputs`; always `close` it.

    The first output of a prompt starts alone; the other n-1 follow when its prompt is computed,
    so that they find it in the prefix cache.
    """

    def __init__(
        self,
        spec: GenerationSpec,
        *,
        request_id: str,
        dispatcher: Dispatcher,
        tokenizer: Tokenizer,
        observer: TokenObserver,
        timeout_s: float,
    ) -> None:
        self.spec = spec
        self.num_prompt_tokens = sum([len(prompt.token_ids) for prompt in spec.prompts])
        self.request_id = request_id
        self.dispatcher = dispatcher
        self.error: TandemError | None = None
        self.aborted = False
        self.start_s = time.monotonic()
        self.first_token_s: float | None = None
        self.end_s: float | None = None
        self.phases: dict[str, float] = {}
        self._observer = observer
        self._wake = asyncio.Event()
        self._over = asyncio.Event()
        n = spec.sampling.n
        self.outputs = [
            Output(
                self,
                i,
                prompt_index=i // n,
                choice=Choice(tokenizer, spec.sampling, spec.make_watch()),
            )
            for i in range(spec.num_outputs)
        ]
        self._num_unfinished = len(self.outputs)
        self._timer = asyncio.get_running_loop().call_later(timeout_s, self._time_out)

    @property
    def is_done(self) -> bool:
        return self.end_s is not None

    @property
    def num_output_tokens(self) -> int:
        if self.spec.is_prompt_only:
            return 0
        return sum([output.choice.num_tokens for output in self.outputs])

    @property
    def num_cached_tokens(self) -> int:
        """Prompt tokens that needed no computing, of each prompt's first output."""
        firsts = self.outputs[:: self.spec.sampling.n]
        return sum([output.num_cached_tokens or 0 for output in firsts])

    @property
    def num_retries(self) -> int:
        return sum(output.flight.num_retries for output in self.outputs if output.flight)

    def start(self) -> None:
        """Does nothing if it's over already, in the queue. Raises OverloadedError."""
        if self.is_done:
            return
        try:
            for output in self.outputs[:: self.spec.sampling.n]:
                output.start()
        except OverloadedError as error:
            self.failed(error)
            raise

    async def news(self) -> None:
        """Returns when an output has something to send, or all is done. One waiter at a time."""
        await self._wake.wait()
        self._wake.clear()

    async def finished(self) -> None:
        """Returns when all is done. Raises the TandemError that ended it."""
        await self._over.wait()
        if self.error is not None:
            raise self.error

    def abort(self) -> None:
        """The client doesn't want it any more; the workers hear it at once."""
        if not self.is_done:
            self.aborted = True
            self.close()

    def close(self) -> None:
        """Ends whatever still runs."""
        for output in self.outputs:
            output.stop()
        self._end()

    def release(self) -> None:
        """Behind the last look at it: unties what refers to each other, which would otherwise be
        the garbage collector's to find, some thirty objects a request."""
        for output in self.outputs:
            output.flight = None
        self.outputs.clear()

    # What the outputs report:

    def output_came(self, output: "Output", num_tokens: int) -> None:
        """`output` has taken new tokens."""
        now_s = time.monotonic()
        if self.first_token_s is None:
            self.first_token_s = now_s
            self._observer.first_token(now_s - self.start_s)
        elif output.last_s is not None and num_tokens:
            self._observer.next_tokens(now_s - output.last_s, num_tokens)
        output.last_s = now_s
        if output.choice.finish_reason is not None:
            self._num_unfinished -= 1
            if self._num_unfinished == 0:
                self._end()
        if output.choice.has_news:
            self._wake.set()

    def prompt_computed(self, first: "Output") -> None:
        """The prompt's other outputs can start."""
        n = self.spec.sampling.n
        try:
            for sibling in self.outputs[first.index + 1 : first.index + n]:
                sibling.start(hashes=first.prompt_hashes)
        except OverloadedError as error:
            self.failed(error)

    def failed(self, error: TandemError) -> None:
        if not self.is_done:
            self.error = error
            self.close()

    def note_phases(self, timings: PhaseTimings) -> None:
        """Keeps the first value of each phase: that of the attempt that gave the first token."""
        for name in PhaseTimings.__struct_fields__:
            value = getattr(timings, name)
            if value is not None:
                self.phases.setdefault(name, value)

    def _end(self) -> None:
        if self.end_s is None:
            self.end_s = time.monotonic()
            self._timer.cancel()
            self._wake.set()
            self._over.set()

    def _time_out(self) -> None:
        self.failed(RequestTimeoutError("The request took longer than this server allows."))


class Output(msgspec.Struct, eq=False):
    """One output and its flight; the flight's sink."""

    generation: Generation
    index: int
    prompt_index: int
    choice: Choice
    flight: Flight | None = None
    prompt_hashes: Sequence[BlockHash] = ()
    num_cached_tokens: int | None = None
    last_s: float | None = None
    prompt_logprobs: list[TokenLogprobs] | None = None
    pooled: bytes | None = None

    @property
    def first(self) -> "Output":
        """The prompt's first output, which alone is told of the prompt."""
        n = self.generation.spec.sampling.n
        return self.generation.outputs[self.prompt_index * n]

    def start(self, *, hashes: Sequence[BlockHash] = ()) -> None:
        """`hashes` of the prompt's blocks, if known. Raises OverloadedError."""
        self.flight = self.generation.dispatcher.start(self._request(), self, hashes=hashes)
        self.prompt_hashes = self.flight.hashes

    def stop(self) -> None:
        if self.flight is not None:
            self.generation.dispatcher.abort(self.flight)

    def deliver(self, output: SequenceOutput) -> None:
        if self.num_cached_tokens is None:
            # The first to say it has computed the prompt; decode says later what it had itself.
            self.num_cached_tokens = output.num_cached_tokens
        if output.timings is not None:
            self.generation.note_phases(output.timings)
        if output.prompt_logprobs is not None:
            self.prompt_logprobs = output.prompt_logprobs
        if output.pooled is not None:
            self.pooled = output.pooled
        self.choice.push(output)
        if self.choice.finish_reason is not None:
            self.stop()
        if self.last_s is None and self is self.first:
            self.generation.prompt_computed(self)
        self.generation.output_came(self, len(output.token_ids))

    def fail(self, error: TandemError) -> None:
        names = {"structured_outputs": self.generation.spec.structure_field}
        self.generation.failed(renamed(error, names))

    def _request(self) -> Request:
        spec = self.generation.spec
        sampling = spec.sampling
        seed = sampling.seed
        if seed is not None:
            # Each of n outputs has its own random numbers.
            seed += self.index % sampling.n
        token_ids = spec.prompts[self.prompt_index].token_ids
        sampling = msgspec.structs.replace(
            sampling, n=1, stop=(), seed=seed, max_tokens=spec.max_tokens[self.prompt_index]
        )
        if self is not self.first:
            sampling = msgspec.structs.replace(sampling, prompt_logprobs=None)
        return Request(
            key=RequestKey(f"{self.generation.request_id}-{self.index}", 1),
            token_ids=token_ids,
            num_prompt_tokens=len(token_ids),
            sampling=sampling,
            cache_salt=spec.cache_salt,
            priority=spec.priority,
            pooling=spec.pooling,
        )
