"""Compiling strangers' grammars where it does no harm, with limits of time and memory.

xgrammar and outlines compile ahead, in native code that nothing can interrupt, and some grammars
keep them busy for hours or bring the process down. So a process of its own holds the library and
the vocabulary, and forks for each grammar: the kernel ends a fork that goes beyond its limits.
"""

import os
import subprocess
import sys
import threading
from pathlib import Path

import msgspec

from protocol.errors import StartupError
from protocol.structured_outputs import StructuredOutputsParams

CPU_LIMIT_S = 2.0
MEMORY_LIMIT_BYTES = 128 << 20
_LENGTH_BYTES = 4
_FIRST = StructuredOutputsParams(regex="a")


class TrialSettings(msgspec.Struct, frozen=True, kw_only=True):
    """What the process is told on its command line."""

    backend: str
    tokenizer_file: str
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    cpu_limit_s: float = CPU_LIMIT_S
    memory_limit_bytes: int = MEMORY_LIMIT_BYTES


class TrialProcess:
    """A `GrammarChecker`; threads may share it, and wait for each other."""

    def __init__(self, settings: TrialSettings) -> None:
        """Waits until the process is ready. It ends with this one.

        Raises StartupError if it doesn't start.
        """
        self._settings = settings
        self._lock = threading.Lock()
        self._process = self._start()
        try:
            self._ask(_FIRST.key)
        except (OSError, EOFError) as error:
            self._end()
            raise StartupError(
                f"The process that compiles grammars by {settings.backend} ended at its start."
            ) from error

    def error_of(self, params: StructuredOutputsParams) -> str:
        """As GrammarCompiler's, within the limits.

        Raises OSError or EOFError if the process doesn't start.
        """
        with self._lock:
            try:
                return self._ask(params.key)
            except (OSError, EOFError):
                # Whatever ended it, killed by an operator or for want of memory: once more.
                self._end()
                self._process = self._start()
            return self._ask(params.key)

    def close(self) -> None:
        """Ends the process, also amid a grammar."""
        self._end()

    def _start(self) -> subprocess.Popen[bytes]:
        settings = msgspec.json.encode(self._settings).decode()
        return subprocess.Popen(
            [sys.executable, "-m", "engine.grammar.trial_process", settings],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        )

    def _ask(self, key: bytes) -> str:
        process = self._process
        assert process.stdin is not None, "asked for"
        assert process.stdout is not None, "asked for"
        write_message(process.stdin.fileno(), key)
        return read_message(process.stdout.fileno()).decode()

    def _end(self) -> None:
        self._process.kill()
        with self._process:
            pass


def read_message(file: int) -> bytes:
    """Raises EOFError when there is none and will be none."""
    return _read_exactly(file, int.from_bytes(_read_exactly(file, _LENGTH_BYTES)))


def write_message(file: int, data: bytes) -> None:
    data = len(data).to_bytes(_LENGTH_BYTES) + data
    while data:
        data = data[os.write(file, data) :]


def _read_exactly(file: int, size: int) -> bytes:
    data = b""
    while len(data) < size:
        more = os.read(file, size - len(data))
        if not more:
            raise EOFError("the other end is gone")
        data += more
    return data
