"""The encoder's loop; all of it runs on the engine thread. A turn: handle commands, then run one
step of whole texts, whoever asked for them."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeAlias

from engine.encoder import EncoderEngine
from engine.text_queue import WaitingText
from protocol.errors import InvalidRequestError
from protocol.ids import RequestKey
from protocol.records import WorkerLoad
from protocol.request import PhaseTimings, Request, SequenceOutput
from services.runtime.load_meter import LoadMeter


@dataclass(slots=True, frozen=True)
class StartText:
    request: Request


@dataclass(slots=True, frozen=True)
class Abort:
    key: RequestKey


Command: TypeAlias = StartText | Abort


@dataclass(slots=True, frozen=True)
class TextRefused:
    """The text can never run here."""

    key: RequestKey
    message: str


@dataclass(slots=True)
class TurnReport:
    """What one turn of the loop tells the event loop."""

    outputs: list[SequenceOutput] = field(default_factory=list[SequenceOutput])
    refused: list[TextRefused] = field(default_factory=list[TextRefused])
    load: WorkerLoad = field(default_factory=WorkerLoad)
    num_tokens: int = 0


class EncodeLoop:
    """The encode worker's `EngineWork`."""

    def __init__(self, engine: EncoderEngine, *, publish: Callable[[TurnReport], None]) -> None:
        self._engine = engine
        self._queue = engine.make_queue()
        self._publish = publish
        self._meter = LoadMeter()
        self._report = TurnReport()

    def handle(self, command: Command) -> None:
        match command:
            case StartText(request):
                try:
                    self._engine.check(request)
                except InvalidRequestError as error:
                    self._report.refused.append(TextRefused(request.key, error.message))
                else:
                    self._queue.add(request, arrival_s=time.monotonic())
            case Abort(key):
                self._queue.abort(key)

    def step(self) -> bool:
        texts = self._queue.take()
        if not texts:
            return False
        started_s = time.monotonic()
        # Said before, so that routers see a long step while it runs.
        self._flush(num_running=len(texts))
        vectors = self._engine.embed([text.request for text in texts])
        step_s = time.monotonic() - started_s
        num_tokens = sum(len(text.request.token_ids) for text in texts)
        self._meter.observe_step(step_s, num_prefill_tokens=num_tokens, num_decoding=0)
        self._report.num_tokens = num_tokens
        self._report.outputs = [
            _output(text, vector, started_s=started_s, step_s=step_s)
            for text, vector in zip(texts, vectors, strict=True)
        ]
        self._flush()
        return True

    def idle(self) -> None:
        self._flush()

    def _flush(self, *, num_running: int = 0) -> None:
        report, self._report = self._report, TurnReport()
        report.load = WorkerLoad(
            num_running=num_running,
            num_waiting=len(self._queue),
            queued_prefill_tokens=self._queue.num_tokens,
            prefill_ms_per_token=self._meter.prefill_ms_per_token,
        )
        self._publish(report)


def _output(text: WaitingText, vector: bytes, *, started_s: float, step_s: float) -> SequenceOutput:
    """The whole answer: a vector, and no token."""
    return SequenceOutput(
        key=text.request.key,
        position=0,
        token_ids=[],
        finish_reason="length",
        num_cached_tokens=0,
        timings=PhaseTimings(prefill_queue_s=started_s - text.arrival_s, prefill_s=step_s),
        pooled=vector,
    )
