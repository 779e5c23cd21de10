"""Prefill's continuous-batching loop; all of it runs on the engine thread.

A turn: handle commands (new prompts, aborts, releases), then finish and commit one step. On a GPU
the next one is under way by then (engine/pipeline.py). The event loop learns which prompts start
(when a step is launched, so that it can ask decode for room while they compute) and how far each
has come (when it's committed, so that it can push full blocks).
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TypeAlias

from engine.engine import Engine
from engine.jump_ahead import JumpAhead
from engine.pipeline import StepPipeline
from engine.sampler.sampled import SampledToken
from engine.scheduler.admission import PrefixStats
from engine.scheduler.plan import SequenceUpdate, StepPlan
from engine.scheduler.prefill import PrefillScheduler
from engine.sequence import Sequence
from protocol.errors import InvalidRequestError
from protocol.ids import RequestKey
from protocol.records import KVEvent, WorkerLoad
from protocol.request import PhaseTimings, Request, SequenceOutput
from services.runtime.idle_check import IdleCheck
from services.runtime.load_meter import LoadMeter


@dataclass(slots=True, frozen=True)
class StartPrefill:
    request: Request


@dataclass(slots=True, frozen=True)
class Release:
    """The prompt's blocks are sent (or needn't be); they stay as prefix cache."""

    key: RequestKey


@dataclass(slots=True, frozen=True)
class Abort:
    """Forget the request; nobody reads its blocks any more."""

    key: RequestKey


@dataclass(slots=True, frozen=True)
class DropCache:
    reset_id: int


Command: TypeAlias = StartPrefill | Release | Abort | DropCache


@dataclass(slots=True, frozen=True)
class ChunkComputed:
    """The prompt's first `num_computed_tokens` tokens are in the first of `block_ids`."""

    key: RequestKey
    num_computed_tokens: int
    block_ids: list[int]


@dataclass(slots=True, frozen=True)
class PromptDone:
    """The first token is sampled, and all of the prompt's KV is in its blocks."""

    first: SequenceOutput
    timings: PhaseTimings


@dataclass(slots=True, frozen=True)
class PromptRefused:
    """The prompt can never run here, or its output can't begin: see `OutputFailure`."""

    key: RequestKey
    message: str
    retryable: bool = False
    field: str | None = None


@dataclass(slots=True, frozen=True)
class CacheDropped:
    """`num_blocks` cached blocks are free now."""

    reset_id: int
    num_blocks: int


@dataclass(slots=True)
class TurnReport:
    """What one turn of the loop tells the event loop; of `chunks`, later ones replace earlier."""

    chunks: list[ChunkComputed] = field(default_factory=list[ChunkComputed])
    done: list[PromptDone] = field(default_factory=list[PromptDone])
    refused: list[PromptRefused] = field(default_factory=list[PromptRefused])
    caches_dropped: list[CacheDropped] = field(default_factory=list[CacheDropped])
    kv_events: list[KVEvent] = field(default_factory=list[KVEvent])
    load: WorkerLoad = field(default_factory=WorkerLoad)
    num_prompt_tokens: int = 0
    num_generated_tokens: int = 0
    prefix_stats: PrefixStats = field(default_factory=PrefixStats)


class PrefillLoop:
    """The prefill worker's `EngineWork`."""

    def __init__(
        self, engine: Engine, scheduler: PrefillScheduler, *, publish: Callable[[TurnReport], None]
    ) -> None:
        self._engine = engine
        self._scheduler = scheduler
        self._pipeline = StepPipeline(engine, scheduler, on_launch=self._announce)
        self._jumps = JumpAhead(engine)
        self._publish = publish
        self._meter = LoadMeter()
        self._idle_check = IdleCheck(engine.pool)
        self._retained: dict[RequestKey, Sequence] = {}
        self._report = TurnReport()

    def handle(self, command: Command) -> None:
        match command:
            case StartPrefill(request):
                self._start(request)
            case Release(key):
                sequence = self._retained.pop(key, None)
                if sequence is not None:
                    self._scheduler.release(sequence)
            case Abort(key):
                self._retained.pop(key, None)
                sequence = self._scheduler.abort(key)
                if sequence is not None:
                    self._engine.release(sequence)
            case DropCache(reset_id):
                dropped = CacheDropped(reset_id, self._engine.pool.reset_cache())
                self._report.caches_dropped.append(dropped)

    def step(self) -> bool:
        finished = self._pipeline.finish_step()
        if finished is None:
            return False
        plan, sampled = finished.plan, self._jump(finished.sampled)
        for item in plan.scheduled:
            if item.sequence.first_scheduled_s is None:
                item.sequence.first_scheduled_s = finished.started_s
        updates = self._scheduler.commit(plan, [token.token_ids for token in sampled])
        now_s = time.monotonic()
        self._meter.observe_step(
            now_s - finished.started_s, num_prefill_tokens=plan.num_tokens, num_decoding=0
        )
        self._report.num_prompt_tokens += plan.num_tokens
        self._report.chunks = [_chunk(item.sequence) for item in plan.scheduled]
        tokens = {token.sequence.key: token for token in sampled}
        for update in updates:
            self._finish(update, tokens[update.sequence.key], now_s)
        self._flush()
        return True

    def idle(self) -> None:
        # First of all the news: a sender may be waiting for its ticket.
        self._flush()
        self._idle_check.run()

    def _jump(self, sampled: list[SampledToken]) -> list[SampledToken]:
        """Decode computes what is forced. Who shares its step there isn't known here, so where
        graphs count it's left to decode: it'll see from the second token on."""
        if self._engine.uses_graphs:
            return sampled
        return self._jumps.extend(sampled, num_running=1, is_ahead=False, loses_graph=False)

    def _start(self, request: Request) -> None:
        self._engine.prepare(request)
        root = self._engine.root_hash(request.cache_salt, max_seq_len=request.max_num_tokens)
        try:
            self._scheduler.add(Sequence(request, root, arrival_s=time.monotonic()))
        except InvalidRequestError as error:
            self._report.refused.append(PromptRefused(request.key, error.message))

    def _announce(self, plan: StepPlan) -> None:
        """Tells of prompts that start now, with the blocks that they found in the prefix cache."""
        self._report.chunks += [
            _chunk(item.sequence)
            for item in plan.scheduled
            if item.sequence.first_scheduled_s is None and item.num_in_flight == 0
        ]
        if self._report.chunks:
            self._flush()

    def _finish(self, update: SequenceUpdate, token: SampledToken, now_s: float) -> None:
        sequence = update.sequence
        assert sequence.first_scheduled_s is not None, "it has just run"
        self._engine.release(sequence)
        # Also if it failed: its blocks may be being sent, until the event loop has stopped that.
        self._retained[sequence.key] = sequence
        failure = token.failure
        if failure is not None:
            self._report.refused.append(
                PromptRefused(
                    sequence.key,
                    failure.message,
                    retryable=failure.field is None,
                    field=failure.field,
                )
            )
            return
        timings = PhaseTimings(
            prefill_queue_s=sequence.first_scheduled_s - sequence.arrival_s,
            prefill_s=now_s - sequence.first_scheduled_s,
        )
        first = SequenceOutput(
            key=sequence.key,
            position=sequence.num_output_tokens - len(update.new_token_ids),
            token_ids=update.new_token_ids,
            finish_reason=update.finish_reason,
            stop_token_id=update.stop_token_id,
            logprobs=None if token.logprobs is None else [token.logprobs],
            num_cached_tokens=sequence.num_cached_tokens,
            timings=timings,
            prompt_logprobs=token.prompt.logprobs,
            pooled=token.prompt.pooled,
        )
        self._report.num_generated_tokens += len(update.new_token_ids)
        self._report.done.append(PromptDone(first, timings))

    def _flush(self) -> None:
        report, self._report = self._report, TurnReport()
        report.kv_events = self._engine.pool.drain_events()
        # A copy: the scheduler goes on counting in its own.
        report.prefix_stats = replace(self._scheduler.prefix_stats)
        report.load = self._meter.load(self._scheduler, self._engine.pool)
        self._publish(report)


def _chunk(sequence: Sequence) -> ChunkComputed:
    return ChunkComputed(sequence.key, sequence.num_computed_tokens, sequence.block_ids)
