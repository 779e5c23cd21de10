"""Decode's continuous-batching loop; all of it runs on the engine thread.

A turn: handle commands (new requests, transfers to make room for or to admit, aborts), give
waiting transfers room, then finish a step, commit it and publish its tokens. On a GPU the next
step is under way by then (engine/pipeline.py).
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TypeAlias

import msgspec

from engine.engine import Engine
from engine.jump_ahead import DecodeJumps
from engine.phase import Phase
from engine.pipeline import StepPipeline
from engine.sampler.sampled import OutputFailure, SampledToken
from engine.scheduler.admission import PrefixStats
from engine.scheduler.decode import DecodeScheduler
from engine.scheduler.plan import SequenceUpdate, StepPlan
from engine.scheduler.reservations import Reservation
from engine.sequence import Sequence
from protocol.errors import InvalidRequestError
from protocol.ids import RequestKey
from protocol.records import KVEvent, WorkerLoad
from protocol.request import PhaseTimings, Request, SequenceOutput
from services.runtime.idle_check import IdleCheck
from services.runtime.load_meter import LoadMeter


@dataclass(slots=True, frozen=True)
class StartLocal:
    request: Request


@dataclass(slots=True, frozen=True)
class MakeRoom:
    """Reserve blocks for a transfer, now or as soon as there are enough."""

    request: Request


@dataclass(slots=True, frozen=True)
class AdmitTransferred:
    """The reserved blocks are filled: go on behind prefill's first token."""

    key: RequestKey
    first: SequenceOutput
    timings: PhaseTimings


@dataclass(slots=True, frozen=True)
class DropTransfer:
    """Give the reservation (or the wait for one) up; its blocks go into quarantine."""

    key: RequestKey


@dataclass(slots=True, frozen=True)
class EndQuarantine:
    """Nothing can write into these blocks any more."""

    key: RequestKey


@dataclass(slots=True, frozen=True)
class Abort:
    key: RequestKey


@dataclass(slots=True, frozen=True)
class DropCache:
    reset_id: int


Command: TypeAlias = (
    StartLocal | MakeRoom | AdmitTransferred | DropTransfer | EndQuarantine | Abort | DropCache
)


@dataclass(slots=True, frozen=True)
class RoomMade:
    """Blocks are reserved: prompt block `num_cached_blocks + i` belongs into `block_ids[i]`."""

    key: RequestKey
    num_cached_blocks: int
    block_ids: list[int]


@dataclass(slots=True, frozen=True)
class Refused:
    """The request can't run here, whatever becomes free, or not on: see `OutputFailure`."""

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
    """Everything one turn of the loop has to tell the event loop."""

    outputs: list[SequenceOutput] = field(default_factory=list[SequenceOutput])
    rooms: list[RoomMade] = field(default_factory=list[RoomMade])
    refused: list[Refused] = field(default_factory=list[Refused])
    caches_dropped: list[CacheDropped] = field(default_factory=list[CacheDropped])
    kv_events: list[KVEvent] = field(default_factory=list[KVEvent])
    load: WorkerLoad = field(default_factory=WorkerLoad)
    num_preempted: int = 0
    num_swapped: int = 0
    num_prompt_tokens: int = 0
    num_generated_tokens: int = 0
    num_forced_tokens: int = 0
    prefix_stats: PrefixStats = field(default_factory=PrefixStats)


class DecodeLoop:
    """The decode worker's `EngineWork`."""

    def __init__(
        self, engine: Engine, scheduler: DecodeScheduler, *, publish: Callable[[TurnReport], None]
    ) -> None:
        self._engine = engine
        self._scheduler = scheduler
        self._publish = publish
        self._pipeline = StepPipeline(engine, scheduler)
        self._jumps = DecodeJumps(engine, scheduler)
        self._meter = LoadMeter()
        self._idle_check = IdleCheck(engine.pool)
        self._awaiting_room: list[Sequence] = []
        self._reservations: dict[RequestKey, Reservation] = {}
        self._stopping: dict[RequestKey, Reservation] = {}
        self._transferred: dict[RequestKey, PhaseTimings] = {}
        self._fresh: dict[RequestKey, Sequence] = {}  # no token has left this worker yet
        self._report = TurnReport()

    def handle(self, command: Command) -> None:
        match command:
            case StartLocal(request):
                self._start_local(request)
            case MakeRoom(request):
                self._awaiting_room.append(self._sequence(request))
                self._awaiting_room.sort(key=lambda sequence: sequence.rank)
            case AdmitTransferred():
                self._admit(command)
            case DropTransfer(key):
                self._drop(key)
            case EndQuarantine(key):
                reservation = self._stopping.pop(key, None)
                if reservation is not None:
                    self._scheduler.confirm_stopped(reservation)
            case Abort(key):
                self._abort(key)
            case DropCache(reset_id):
                dropped = CacheDropped(reset_id, self._engine.pool.reset_cache())
                self._report.caches_dropped.append(dropped)

    def step(self) -> bool:
        self._give_room()
        finished = self._pipeline.finish_step()
        if finished is None:
            return False
        plan, sampled = finished.plan, self._jumps.extend(finished)
        self._note_start(plan, finished.started_s)
        prompts = [i for i in plan.scheduled if i.sequence.phase is Phase.PREFILLING]
        num_prefill_tokens = sum(item.num_new_tokens for item in prompts)
        for token in sampled:
            if token.failure is not None:
                self._give_up(token.sequence.key, token.failure)
        updates = self._scheduler.commit(plan, [token.token_ids for token in sampled])
        now_s = time.monotonic()
        self._meter.observe_step(
            now_s - finished.started_s,
            num_prefill_tokens=num_prefill_tokens,
            num_decoding=len(plan.scheduled) - len(prompts),
        )
        tokens = {token.sequence.key: token for token in sampled}
        for update in updates:
            self._deliver(update, tokens[update.sequence.key], now_s)
        self._report.num_preempted += len(plan.preempted)
        self._report.num_prompt_tokens += num_prefill_tokens
        num_generated = sum(len(update.new_token_ids) for update in updates)
        self._report.num_generated_tokens += num_generated
        self._report.num_forced_tokens += num_generated - len(updates)
        self._flush()
        return True

    def idle(self) -> None:
        # First of all the news: a sender may be waiting for its ticket.
        self._flush()
        self._idle_check.run()

    def _sequence(self, request: Request) -> Sequence:
        self._engine.prepare(request)
        root = self._engine.root_hash(request.cache_salt, max_seq_len=request.max_num_tokens)
        return Sequence(request, root, arrival_s=time.monotonic())

    def _start_local(self, request: Request) -> None:
        sequence = self._sequence(request)
        try:
            self._scheduler.add(sequence)
        except InvalidRequestError as error:
            self._report.refused.append(Refused(request.key, error.message))
        else:
            self._fresh[request.key] = sequence

    def _give_room(self) -> None:
        """Reserves in rank order up to the first that has to wait, so that none is overtaken."""
        while self._awaiting_room:
            sequence = self._awaiting_room[0]
            try:
                reservation = self._scheduler.try_reserve(sequence)
            except InvalidRequestError as error:
                self._report.refused.append(Refused(sequence.key, error.message))
            else:
                if reservation is None:
                    break
                self._reservations[sequence.key] = reservation
                self._report.rooms.append(
                    RoomMade(
                        sequence.key, reservation.num_cached_blocks, list(reservation.block_ids)
                    )
                )
            del self._awaiting_room[0]
        if self._report.rooms or self._report.refused:
            # Before the step: the sender is waiting for its ticket.
            self._flush()

    def _admit(self, command: AdmitTransferred) -> None:
        sequence = self._reservations.pop(command.key).sequence
        sequence.token_ids.extend(command.first.token_ids)
        sequence.arrival_s = time.monotonic()
        self._scheduler.admit(sequence)
        self._transferred[sequence.key] = command.timings
        self._fresh[sequence.key] = sequence

    def _drop(self, key: RequestKey) -> None:
        reservation = self._reservations.pop(key, None)
        if reservation is not None:
            self._scheduler.cancel_reservation(reservation)
            self._stopping[key] = reservation
        else:
            self._awaiting_room = [s for s in self._awaiting_room if s.key != key]

    def _abort(self, key: RequestKey) -> None:
        self._fresh.pop(key, None)
        self._transferred.pop(key, None)
        sequence = self._scheduler.abort(key)
        if sequence is not None:
            self._engine.release(sequence)

    def _give_up(self, key: RequestKey, failure: OutputFailure) -> None:
        self._abort(key)
        self._report.refused.append(
            Refused(key, failure.message, retryable=failure.field is None, field=failure.field)
        )

    def _note_start(self, plan: StepPlan, now_s: float) -> None:
        for item in plan.scheduled:
            sequence = item.sequence
            if sequence.first_scheduled_s is None:
                sequence.first_scheduled_s = now_s

    def _deliver(self, update: SequenceUpdate, token: SampledToken, now_s: float) -> None:
        sequence = update.sequence
        timings, num_cached_tokens = None, None
        if self._fresh.pop(sequence.key, None) is not None:
            timings = self._first_timings(sequence, now_s)
            num_cached_tokens = sequence.num_cached_tokens
        if update.finish_reason is not None:
            self._engine.release(sequence)
        self._report.outputs.append(
            SequenceOutput(
                key=sequence.key,
                position=sequence.num_output_tokens - len(update.new_token_ids),
                token_ids=update.new_token_ids,
                finish_reason=update.finish_reason,
                stop_token_id=update.stop_token_id,
                logprobs=None if token.logprobs is None else [token.logprobs],
                num_cached_tokens=num_cached_tokens,
                timings=timings,
                prompt_logprobs=token.prompt.logprobs,
                pooled=token.prompt.pooled,
            )
        )

    def _first_timings(self, sequence: Sequence, now_s: float) -> PhaseTimings:
        assert sequence.first_scheduled_s is not None, "it has just run"
        queue_s = sequence.first_scheduled_s - sequence.arrival_s
        run_s = now_s - sequence.first_scheduled_s
        prefill = self._transferred.pop(sequence.key, None)
        if prefill is None:
            return PhaseTimings(prefill_queue_s=queue_s, prefill_s=run_s)
        return msgspec.structs.replace(prefill, decode_queue_s=queue_s, first_step_s=run_s)

    def _flush(self) -> None:
        report, self._report = self._report, TurnReport()
        report.kv_events = self._engine.pool.drain_events()
        report.num_swapped = self._scheduler.num_swapped
        # A copy: the scheduler goes on counting in its own.
        report.prefix_stats = replace(self._scheduler.prefix_stats)
        report.load = self._meter.load(self._scheduler, self._engine.pool)
        self._publish(report)
