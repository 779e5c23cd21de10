"""Keeps a stack's processes alive: starts them together, restarts crashed ones, ends them all.

A process is STARTING until the probe says it is ready. One that ends before its first READY has
a reason that a restart won't cure, so it fails the stack; one that ends later is started again: at
once, since requests wait for it, and from its second quick death on after a pause that doubles.
"""

import asyncio
import contextlib
import signal
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum

from cli.child import Child, ChildSpec, describe_exit
from protocol.errors import StartupError

_PROBE_INTERVAL_S = 0.05
_FIRST_BACKOFF_S = 0.5
_MAX_BACKOFF_S = 30.0
_STEADY_S = 60.0
_KILL_WAIT_S = 5.0


class State(StrEnum):
    """Where a process is in its life."""

    STARTING = "starting"
    READY = "ready"
    RESTARTING = "restarting"
    STOPPING = "stopping"
    STOPPED = "stopped"


@dataclass(frozen=True, slots=True)
class Service:
    """A process to keep alive. `tier` orders the stop: higher tiers end before lower ones.

    `is_ready(pid)` is asked until it first says yes.
    """

    spec: ChildSpec
    role: str
    tier: int
    is_ready: Callable[[int], Awaitable[bool]]
    stop_timeout_s: float


class Supervised:
    """A `Service` and its present life."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self.state = State.STARTING
        self.num_restarts = 0
        self.child: Child | None = None
        self.became_ready = asyncio.Event()

    @property
    def name(self) -> str:
        return self.service.spec.name

    @property
    def pid(self) -> int | None:
        return self.child.pid if self.child is not None and self.child.running else None


class Supervisor:
    """Runs `services` inside `async with`; `on_change` hears of every change of a state."""

    def __init__(
        self,
        services: Sequence[Service],
        *,
        on_change: Callable[[Supervised, str], None],
    ) -> None:
        self.supervised = [Supervised(service) for service in services]
        self._on_change = on_change
        self._stopping = asyncio.Event()

    async def wait_ready(self, *, timeout_s: float) -> None:
        """Until all are ready; StartupError names those that aren't after `timeout_s`."""
        try:
            async with asyncio.timeout(timeout_s):
                for one in self.supervised:
                    await one.became_ready.wait()
        except TimeoutError:
            late = [one.name for one in self.supervised if not one.became_ready.is_set()]
            raise StartupError(
                f"{' and '.join(late)} didn't get ready within {timeout_s:g} s."
            ) from None

    async def run(self) -> None:
        """Keeps everything running until `stop`; StartupError if a process can't start."""
        try:
            async with asyncio.TaskGroup() as tasks:
                for one in self.supervised:
                    tasks.create_task(self._keep(one))
        except BaseExceptionGroup as group:
            # The first failure cancelled the others.
            raise group.exceptions[0] from None

    async def stop(self) -> None:
        """Ends all processes, tier by tier, each tier together; then `run` returns."""
        self._stopping.set()
        for tier in sorted({one.service.tier for one in self.supervised}, reverse=True):
            members = [one for one in self.supervised if one.service.tier == tier]
            await asyncio.gather(*(self._stop_one(one) for one in members))

    def kill(self) -> None:
        """Ends all processes at once."""
        self._stopping.set()
        for one in self.supervised:
            if one.child is not None:
                one.child.signal(signal.SIGKILL)

    async def _keep(self, one: Supervised) -> None:
        backoff_s = 0.0
        while not self._stopping.is_set():
            started_s = time.monotonic()
            one.child = child = await Child.start(one.service.spec)
            if self._stopping.is_set():
                # Whoever stopped it found nothing to end yet.
                child.signal(signal.SIGKILL)
            self._change(one, State.STARTING, f"pid {child.pid}")
            status = await self._wait_for_end(one, child)
            if self._stopping.is_set():
                break
            if not one.became_ready.is_set():
                raise StartupError(_start_failure(one.name, child, status))
            if time.monotonic() - started_s > _STEADY_S:
                backoff_s = 0.0
            one.num_restarts += 1
            when = f" in {backoff_s:g} s" if backoff_s else ""
            self._change(
                one,
                State.RESTARTING,
                f"ended ({_reason(child, status)}); starting it again{when}",
            )
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), backoff_s)
            backoff_s = min(max(2 * backoff_s, _FIRST_BACKOFF_S), _MAX_BACKOFF_S)
        self._change(one, State.STOPPED, "")

    async def _wait_for_end(self, one: Supervised, child: Child) -> int:
        probe = asyncio.create_task(self._probe(one, child))
        end = asyncio.create_task(child.wait())
        try:
            # A probe ends by itself only when the process is ready, or by an error to pass on.
            await asyncio.wait((probe, end), return_when=asyncio.FIRST_COMPLETED)
            if probe.done():
                probe.result()
            # Not `await end`: to cancel us would cancel the task that reaps the process.
            await asyncio.wait((end,))
            return end.result()
        finally:
            probe.cancel()
            child.signal(signal.SIGKILL)
            await asyncio.wait((end,))

    async def _probe(self, one: Supervised, child: Child) -> None:
        # Readiness is seen from outside, where nothing calls back.
        while not await one.service.is_ready(child.pid):  # noqa: ASYNC110
            await asyncio.sleep(_PROBE_INTERVAL_S)
        if child.running and not self._stopping.is_set():
            one.became_ready.set()
            self._change(one, State.READY, "")

    async def _stop_one(self, one: Supervised) -> None:
        child = one.child
        if child is None or not child.running:
            return
        self._change(one, State.STOPPING, "")
        child.signal(signal.SIGTERM)
        if not await child.ended_within(one.service.stop_timeout_s):
            child.signal(signal.SIGKILL)
            await child.ended_within(_KILL_WAIT_S)

    def _change(self, one: Supervised, state: State, detail: str) -> None:
        one.state = state
        self._on_change(one, detail)


def _start_failure(name: str, child: Child, status: int) -> str:
    return f"{name} can't start: {_reason(child, status)}"


def _reason(child: Child, status: int) -> str:
    """What the process said last if it ended by itself, else its exit status."""
    return child.last_words if status > 0 and child.last_words else describe_exit(status)
