"""A stack from its start to its end: signals, the stack file, and what the terminal hears."""

import asyncio
import os
import signal
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence

from cli.announce import Announcer, Row
from cli.registered_workers import RegisteredWorkers
from cli.runtime_dir import RuntimeDir, StackProcess, StackRecord
from cli.stack import Endpoints
from cli.supervisor import Service, Supervised, Supervisor

# What a stack was started for; it gets the stack's URL.
StackWork = Callable[[str], Awaitable[None]]


class RunningStack:
    """The processes of `services`; `worker_ids` gives their workers' ids in Redis."""

    def __init__(
        self,
        services: Sequence[Service],
        *,
        model: str,
        endpoints: Endpoints,
        workers: RegisteredWorkers,
        worker_ids: Mapping[str, str],
        runtime: RuntimeDir,
        announcer: Announcer,
    ) -> None:
        self._supervisor = Supervisor(services, on_change=self._on_change)
        self._model = model
        self._endpoints = endpoints
        self._workers = workers
        self._worker_ids = worker_ids
        self._runtime = runtime
        self._announcer = announcer
        self._started_unix_s = time.time()
        self._stop = asyncio.Event()

    async def run(self, *, start_timeout_s: float, work: StackWork | None = None) -> None:
        """Until a signal or the end of `work`, which a signal cancels.

        StartupError if a process can't start or isn't ready in time.
        """
        self._listen_for_signals()
        names = ", ".join(one.name for one in self._supervisor.supervised)
        self._announcer.say("starting", f"Starting {names} for {self._model} …")
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._supervisor.run())
                reporting = tasks.create_task(self._when_ready(start_timeout_s, work))
                await self._stop.wait()
                reporting.cancel()
                self._announcer.say("stopping", "Stopping; what runs may end first …")
                await self._supervisor.stop()
        except BaseExceptionGroup as group:
            # The first failure cancelled the others.
            raise group.exceptions[0] from None
        self._announcer.say("stopped", "Stopped.")

    def _listen_for_signals(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            # nohup has it that a closed terminal is no reason to stop.
            if signal.getsignal(number) is not signal.SIG_IGN:
                loop.add_signal_handler(number, self._on_signal)

    def _on_signal(self) -> None:
        if self._stop.is_set():
            self._supervisor.kill()
        self._stop.set()

    async def _when_ready(self, timeout_s: float, work: StackWork | None) -> None:
        await self._supervisor.wait_ready(timeout_s=timeout_s)
        self._announcer.ready(model=self._model, url=self._url, rows=await self._rows())
        if work is not None:
            await work(self._url)
            self._stop.set()

    async def _rows(self) -> list[Row]:
        rows: list[Row] = []
        for one in self._supervisor.supervised:
            if one.pid is None:
                continue
            record = None
            if worker_id := self._worker_ids.get(one.name):
                record = await self._workers.record(worker_id)
            address = record.ref.control_address if record else self._address(one) or ""
            rows.append(Row(one.name, one.pid, address, record))
        return rows

    def _on_change(self, one: Supervised, detail: str) -> None:
        self._announcer.changed(one, detail)
        processes = [
            StackProcess(
                name=each.name,
                role=each.service.role,
                pid=each.pid,
                state=each.state.value,
                restarts=each.num_restarts,
                worker_id=self._worker_ids.get(each.name),
                address=self._address(each),
            )
            for each in self._supervisor.supervised
        ]
        self._runtime.write_record(
            StackRecord(
                supervisor_pid=os.getpid(),
                started_unix_s=self._started_unix_s,
                model=self._model,
                url=self._url,
                redis_url=self._endpoints.redis_url,
                processes=processes,
            )
        )

    def _address(self, one: Supervised) -> str | None:
        match one.service.role:
            case "router":
                return self._url
            case "redis":
                return self._endpoints.redis_url
            case _:
                return None

    @property
    def _url(self) -> str:
        return f"http://{self._endpoints.http_host}:{self._endpoints.http_port}"
