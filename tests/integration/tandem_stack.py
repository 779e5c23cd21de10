"""A real stack for tests: `tandem serve` as a user starts it, seen through `tandem ps` and HTTP."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import httpx

from cli.child import die_with_parent
from cli.ps import describe_all
from cli.runtime_dir import local_stacks

START_DEADLINE_S = 120.0
SETTLE_DEADLINE_S = 30.0
STOP_DEADLINE_S = 40.0
MODEL = "SmolLM2-135M-Instruct"

ValueT = TypeVar("ValueT")


class TandemStack:
    """Runs `tandem serve` with these arguments inside `with`; its output goes to `log`."""

    url: str
    port: int

    def __init__(self, log: Path, *arguments: str, name: str = "") -> None:
        self.name = name
        self._log = log
        # Whichever port is free by then.
        self._command = [sys.executable, "-m", "cli", "serve", "--port", "0", *arguments]
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        with self._log.open("wb") as output:
            self._process = subprocess.Popen(
                self._command,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=die_with_parent(os.getpid()),
            )
        try:
            wait_for(self._is_ready, "the stack to start", START_DEADLINE_S)
        except BaseException:
            self._process.kill()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        status = self.interrupt()
        assert status == 0 or error is not None, f"exit status {status}:\n{self.output()}"

    def interrupt(self) -> int:
        """Ctrl-C; returns the exit status."""
        assert self._process is not None
        self._process.send_signal(signal.SIGINT)
        try:
            return self._process.wait(STOP_DEADLINE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            raise AssertionError(f"the stack does not stop:\n{self.output()}") from None

    def output(self) -> str:
        return self._log.read_text(errors="replace")

    def processes(self) -> dict[str, dict[str, Any]]:
        """What `tandem ps --json` says about this stack, by process name."""
        assert self._process is not None
        # In this process: a command a look would take more of the cores than the stack itself. On
        # a thread, since some tests have a loop of their own.
        with ThreadPoolExecutor(1) as thread:
            stacks = thread.submit(lambda: asyncio.run(describe_all(local_stacks()))).result()
        for stack in stacks:
            if stack["supervisor_pid"] == self._process.pid:
                return {process["name"]: process for process in stack["processes"]}
        return {}

    def workers(self) -> dict[str, dict[str, Any]]:
        return {
            name: process
            for name, process in self.processes().items()
            if process["role"] in ("prefill", "decode", "encode")
        }

    def kill(self, name: str) -> int:
        """kill -9; returns the pid."""
        pid = self.processes()[name]["pid"]
        os.kill(pid, signal.SIGKILL)
        return pid

    def wait_restarted(self, name: str, old_pid: int) -> None:
        def is_back() -> bool:
            process = self.processes().get(name)
            return (
                process is not None
                and process["pid"] not in (None, old_pid)
                and process["load"] is not None
            )

        wait_for(is_back, f"{name} to come back", START_DEADLINE_S)

    def wait_idle(self) -> None:
        """Until no worker holds a block for anybody, and all blocks are accounted for."""
        wait_for(self._is_idle, "all blocks to return", SETTLE_DEADLINE_S, self.workers)

    def metric(self, name: str, source: str | None = None) -> float:
        """Sum of a metric's samples over labels; `source` is a worker's name, else the router."""
        address = self.url
        if source is not None:
            address = self.processes()[source]["addresses"]["metrics"]
        text = httpx.get(f"{address}/metrics", timeout=10.0).text
        samples = [line for line in text.splitlines() if line.split("{")[0].split(" ")[0] == name]
        assert samples or f"# TYPE {name} " in text, f"no metric {name} in\n{text}"
        return sum(float(line.rsplit(" ", 1)[1]) for line in samples)

    def _is_ready(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, f"the stack ended at once:\n{self.output()}"
        if "\nReady after " not in self.output():
            return False
        processes = self.processes()
        if not processes or any(process["state"] != "ready" for process in processes.values()):
            return False
        self.url = processes["router-0"]["addresses"]["service"]
        self.port = int(self.url.rpartition(":")[2])
        try:
            return httpx.get(f"{self.url}/health", timeout=5.0).status_code == 200
        except httpx.TransportError:
            return False

    def _is_idle(self) -> bool:
        workers = self.workers()
        return bool(workers) and all(_is_idle(worker) for worker in workers.values())


def _is_idle(worker: dict[str, Any]) -> bool:
    load = worker["load"]
    if load is None:
        return False
    in_use = load["num_referenced_blocks"], load["num_quarantined_blocks"], load["num_running"]
    accounted = load["num_free_blocks"] + load["num_cached_blocks"]
    return not any(in_use) and accounted == worker["num_blocks"]


def wait_for(
    condition: Callable[[], bool],
    what: str,
    deadline_s: float,
    describe: Callable[[], object] | None = None,
) -> None:
    """Polls what nobody calls back for; fails with what was waited for."""
    end_s = time.monotonic() + deadline_s
    while not condition():
        if time.monotonic() > end_s:
            state = "" if describe is None else f": {describe()}"
            raise AssertionError(f"waited {deadline_s:g} s for {what}{state}")
        time.sleep(0.05)
