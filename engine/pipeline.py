"""Steps in a row: on a GPU, the next one is launched before the host knows this one's tokens.

    host     launch n+1 | wait for n | commit n, send its tokens | launch n+2 | wait for n+1 …
    device   … step n ------------> step n+1 -------------------------------> step n+2 …

So the device finds its next step when it's through with one, and all that the host does for a
step happens while the device is busy. Where the next step's choice of tokens depends on these by
rules of the host (grammars, limits on thoughts), the step ahead is launched up to its logits, and
samples when these are committed: masks are made while it runs. Who knows the next token by then,
because a grammar forces it, doesn't sample (jump_ahead.py). Where the next step itself depends
on what this one frees (blocks run out) or tells of a prompt, it waits.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from engine.engine import Engine
from engine.running_step import RunningStep
from engine.sampler.sampled import SampledToken
from engine.scheduler.plan import StepPlan


class PipelinedScheduler(Protocol):
    """What `DecodeScheduler` and `PrefillScheduler` have in common."""

    def schedule(self) -> StepPlan:
        """The next step; all steps before it are committed."""
        ...

    def schedule_ahead(self, running: StepPlan) -> StepPlan | None:
        """The step behind `running`, whose tokens aren't known yet; None if it has to wait."""
        ...


@dataclass(frozen=True, slots=True)
class FinishedStep:
    """To be committed before the next one is asked for. It had the device to itself from
    `started_s` on (monotonic clock); `is_followed` if the next one is launched."""

    plan: StepPlan
    sampled: list[SampledToken]
    started_s: float
    is_followed: bool


@dataclass(frozen=True, slots=True)
class _InFlight:
    plan: StepPlan
    step: RunningStep
    launched_s: float


class StepPipeline:
    """The steps of one scheduler on one engine."""

    def __init__(
        self,
        engine: Engine,
        scheduler: PipelinedScheduler,
        *,
        on_launch: Callable[[StepPlan], None] | None = None,
    ) -> None:
        """`on_launch` hears of each step when it's queued on the device."""
        self._engine = engine
        self._scheduler = scheduler
        self._on_launch = on_launch
        self._running: _InFlight | None = None
        self._last_finished_s = 0.0

    @property
    def is_running(self) -> bool:
        """Whether a step is on the device: its blocks aren't all free before it's finished."""
        return self._running is not None

    def finish_step(self) -> FinishedStep | None:
        """The oldest step that isn't finished yet, or a new one; None if nothing can run."""
        running = self._running or self._launch(self._scheduler.schedule())
        if running is None:
            return None
        running.step.sample()
        self._running = self._launch_ahead(running)
        sampled = running.step.result()
        started_s = max(running.launched_s, self._last_finished_s)
        self._last_finished_s = time.monotonic()
        return FinishedStep(running.plan, sampled, started_s, self.is_running)

    def _launch_ahead(self, running: _InFlight) -> _InFlight | None:
        if not (self._engine.runs_ahead and running.step.may_be_followed):
            return None
        plan = self._scheduler.schedule_ahead(running.plan)
        ahead = None if plan is None else self._launch(plan)
        if ahead is not None and running.step.is_free:
            ahead.step.sample()
        return ahead

    def _launch(self, plan: StepPlan) -> _InFlight | None:
        launched_s = time.monotonic()
        step = self._engine.launch(plan)
        if not (plan.scheduled or plan.preempted):
            return None
        if self._on_launch is not None:
            self._on_launch(plan)
        return _InFlight(plan, step, launched_s)
