"""One child process: ends with its parent, and its output lines carry its name."""

import asyncio
import ctypes
import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import BinaryIO

_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None, use_errno=True)
_READ_BYTES = 1 << 16
_REASON_PREFIX = "tandem: "
_LAST_OUTPUT_TIMEOUT_S = 1.0


@dataclass(frozen=True, slots=True)
class ChildSpec:
    """What to run.

    `label` precedes each line of output; an empty one leaves lines as they are. What a `quiet`
    process writes is only kept for its `last_words`.
    """

    name: str
    argv: tuple[str, ...]
    environ: Mapping[str, str]
    label: str = ""
    pass_fds: tuple[int, ...] = ()
    quiet: bool = False


class Child:
    """A running process of a `ChildSpec`; `wait` must be awaited by whoever started it."""

    def __init__(self, spec: ChildSpec, process: asyncio.subprocess.Process) -> None:
        self.spec = spec
        self.pid = process.pid
        self._process = process
        self._reason = ""
        self._last_stdout = ""
        self._last_stderr = ""
        self._ended = asyncio.Event()

    @classmethod
    async def start(cls, spec: ChildSpec) -> "Child":
        """Starts the process in its own session, so that a terminal's Ctrl-C reaches us alone."""
        process = await asyncio.create_subprocess_exec(
            *spec.argv,
            env=dict(spec.environ),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            pass_fds=spec.pass_fds,
            start_new_session=True,
            preexec_fn=die_with_parent(os.getpid()),
        )
        return cls(spec, process)

    @property
    def running(self) -> bool:
        return self._process.returncode is None

    @property
    def last_words(self) -> str:
        """Its reason for ending, if it gave one, else the last line of stderr, else of stdout."""
        return self._reason or self._last_stderr or self._last_stdout

    async def wait(self) -> int:
        """Forwards output until the process has ended; its exit status, or minus its signal."""
        stdout, stderr = self._process.stdout, self._process.stderr
        assert stdout is not None
        assert stderr is not None
        forwards = [
            asyncio.create_task(self._forward(stdout, sys.stdout.buffer)),
            asyncio.create_task(self._forward(stderr, sys.stderr.buffer)),
        ]
        try:
            status = await self._process.wait()
            # What it wrote last is still in the pipes; a grandchild could hold them open for long.
            await asyncio.wait(forwards, timeout=_LAST_OUTPUT_TIMEOUT_S)
        finally:
            for forward in forwards:
                forward.cancel()
            self._ended.set()
        return status

    async def ended_within(self, timeout_s: float) -> bool:
        """Whether the process ends (and `wait` returns) before `timeout_s` have passed."""
        try:
            await asyncio.wait_for(self._ended.wait(), timeout_s)
        except TimeoutError:
            return False
        return True

    def signal(self, number: signal.Signals) -> None:
        """Sends a signal unless the process has ended."""
        if self.running:
            self._process.send_signal(number)

    async def _forward(self, source: asyncio.StreamReader, sink: BinaryIO) -> None:
        rest = b""
        while chunk := await source.read(_READ_BYTES):
            *lines, rest = (rest + chunk).split(b"\n")
            self._write(sink, lines)
        if rest:
            self._write(sink, [rest])

    def _write(self, sink: BinaryIO, lines: Sequence[bytes]) -> None:
        prefix = self.spec.label.encode()
        for line in lines:
            self._remember(
                line.decode(errors="replace").strip(), is_stderr=sink is sys.stderr.buffer
            )
            # The supervisor says the reason for an end itself.
            if self.spec.quiet or line.startswith(_REASON_PREFIX.encode()):
                continue
            try:
                sink.write(prefix + line + b"\n")
                sink.flush()
            except BrokenPipeError:
                # Whoever read our output has gone. Serving goes on, and the child's pipe must
                # still be emptied, or the child would block on it.
                return

    def _remember(self, line: str, *, is_stderr: bool) -> None:
        if line.startswith(_REASON_PREFIX):
            self._reason = line.removeprefix(_REASON_PREFIX)
        elif line and is_stderr:
            self._last_stderr = line
        elif line:
            self._last_stdout = line


def die_with_parent(parent_pid: int) -> Callable[[], None]:
    """A `preexec_fn`: the kernel kills the child when the process `parent_pid` ends, however."""

    def arrange() -> None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent_pid:
            # The parent ended before the kernel knew our wish.
            os._exit(1)

    return arrange


def describe_exit(status: int) -> str:
    """An exit status in words."""
    if status >= 0:
        return f"exit status {status}"
    try:
        return signal.Signals(-status).name
    except ValueError:
        return f"signal {-status}"
