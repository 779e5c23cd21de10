"""Continuous batching on one thread: step after step, until nothing is left."""

from collections.abc import Iterator
from dataclasses import dataclass

from engine.engine import Engine
from engine.jump_ahead import DecodeJumps
from engine.pipeline import StepPipeline
from engine.sampler.sampled import NO_REPORT, OutputFailure, PromptReport
from engine.scheduler.decode import DecodeScheduler
from engine.scheduler.plan import SequenceUpdate
from engine.sequence import Sequence
from protocol.ids import RequestKey
from protocol.request import TokenLogprobs


@dataclass(frozen=True, slots=True)
class StepResult:
    """A sequence's new tokens, `update.new_token_ids`, and what was asked for about the first of
    them and, with an output's first, about the prompt. With a `failure` there is none, and the
    sequence is gone."""

    update: SequenceUpdate
    logprobs: TokenLogprobs | None
    prompt: PromptReport = NO_REPORT
    failure: OutputFailure | None = None


class StepLoop:
    """An engine with a scheduler that prefills and decodes."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        engine.allocate_swap_space()
        self.scheduler = DecodeScheduler(engine.pool, engine.scheduler_config)
        self._pipeline = StepPipeline(engine, self.scheduler)
        self._jumps = DecodeJumps(engine, self.scheduler)

    @property
    def has_work(self) -> bool:
        scheduler = self.scheduler
        return self._pipeline.is_running or scheduler.num_running + scheduler.num_waiting > 0

    def add(self, sequence: Sequence) -> None:
        """Raises InvalidRequestError if it can never run here."""
        self.scheduler.add(sequence)

    def abort(self, key: RequestKey) -> None:
        """Frees a sequence that isn't wanted any more; unknown keys are ignored."""
        sequence = self.scheduler.abort(key)
        if sequence is not None:
            self.engine.release(sequence)

    def settle(self) -> None:
        """Lets what is on the device end: what was aborted meanwhile holds no block afterwards."""
        while self._pipeline.is_running:
            for _ in self.step():
                pass

    def step(self) -> Iterator[StepResult]:
        """One step's new tokens. Finished sequences have freed their rows."""
        finished = self._pipeline.finish_step()
        assert finished is not None, "there is work, but no step can do any of it"
        sampled = self._jumps.extend(finished)
        failed = [token for token in sampled if token.failure is not None]
        for token in failed:
            self.abort(token.sequence.key)
        updates = self.scheduler.commit(finished.plan, [token.token_ids for token in sampled])
        tokens = {token.sequence: token for token in sampled}
        for update in updates:
            if update.finish_reason is not None:
                self.engine.release(update.sequence)
            token = tokens[update.sequence]
            yield StepResult(update, token.logprobs, token.prompt)
        for token in failed:
            update = SequenceUpdate(token.sequence, [], "abort")
            yield StepResult(update, None, failure=token.failure)
