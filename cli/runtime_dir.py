"""A local stack's private directory: Redis' socket and the file that `tandem ps` reads.

A guardian process removes it when the stack ends, also after kill -9: it waits for the end of a
pipe that only the supervisor holds open. It also ends the MPS daemon whose sockets lie in it.
"""

import os
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from protocol.decoding import decode
from protocol.errors import StartupError, UnreadableError

_STACK_FILE = "stack.json"
_MAX_SOCKET_PATH_BYTES = 107
_GUARDIAN_EXIT_TIMEOUT_S = 10.0
# It waits for its clients, so that one which hangs would keep it.
_MPS_QUIT_TIMEOUT_S = 5.0
# `cat` ends with the pipe. The parent directory goes too unless another stack lives in it.
_GUARDIAN_SCRIPT = """
trap "" INT TERM HUP
cat >/dev/null
[ ! -d "$1/mps" ] ||
    echo quit | CUDA_MPS_PIPE_DIRECTORY="$1/mps" timeout -s KILL "$3" nvidia-cuda-mps-control
rm -rf "$1"
rmdir "$2" 2>/dev/null
:
"""


class StackProcess(msgspec.Struct, frozen=True, kw_only=True):
    """One process as its supervisor sees it; `pid` is None between two lives."""

    name: str
    role: str
    pid: int | None
    state: str
    restarts: int = 0
    worker_id: str | None = None
    address: str | None = None


class StackRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A local stack; rewritten whenever one of its processes changes state."""

    supervisor_pid: int
    started_unix_s: float
    model: str
    url: str
    redis_url: str
    processes: list[StackProcess]


_stack_decoder = msgspec.json.Decoder(StackRecord)


class RuntimeDir:
    """The directory of one running stack."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def redis_socket(self) -> Path:
        return self.path / "redis.sock"

    @property
    def mps(self) -> Path:
        """For NVIDIA's MPS, if the stack uses it."""
        return self.path / "mps"

    def write_record(self, record: StackRecord) -> None:
        """Replaces the stack file at once, so that a reader never sees half of it."""
        temporary = self.path / f"{_STACK_FILE}.new"
        temporary.write_bytes(msgspec.json.encode(record))
        temporary.replace(self.path / _STACK_FILE)


@contextmanager
def runtime_dir() -> Iterator[RuntimeDir]:
    """A new private directory that is gone afterwards, even if this process is killed."""
    parent = _runtime_parent()
    path = _make_private(parent) / str(os.getpid())
    if len(os.fsencode(path / "redis.sock")) > _MAX_SOCKET_PATH_BYTES:
        raise StartupError(
            f"The path {path} is too long for a socket; set TMPDIR to a shorter one."
        )
    arguments = (str(path), str(parent), f"{_MPS_QUIT_TIMEOUT_S:g}")
    with subprocess.Popen(
        ["/bin/sh", "-c", _GUARDIAN_SCRIPT, "tandem-guardian", *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    ) as guardian:
        try:
            # Only a dead process that had our pid can have left one behind.
            shutil.rmtree(path, ignore_errors=True)
            path.mkdir(mode=0o700)
            yield RuntimeDir(path)
        finally:
            assert guardian.stdin is not None
            guardian.stdin.close()
            guardian.wait(_GUARDIAN_EXIT_TIMEOUT_S)


def local_stacks() -> list[StackRecord]:
    """The stacks of this user that run on this machine, oldest first."""
    records: list[StackRecord] = []
    for path in _runtime_parent().glob(f"*/{_STACK_FILE}"):
        try:
            record = decode(_stack_decoder, path.read_bytes())
        except (FileNotFoundError, UnreadableError):
            # A stack that is just ending, or another release's.
            continue
        if Path(f"/proc/{record.supervisor_pid}").exists():
            records.append(record)
    return sorted(records, key=lambda record: record.started_unix_s)


def _runtime_parent() -> Path:
    return Path(tempfile.gettempdir()) / f"tandem-{os.getuid()}"


def _make_private(path: Path) -> Path:
    """Makes `path` for this user alone; refuses one that somebody else has put there."""
    try:
        path.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise StartupError(f"Can't make the directory {path}: {error.strerror}.") from error
    status = path.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid():
        raise StartupError(f"{path} exists and isn't this user's own directory; remove it.")
    path.chmod(0o700)
    return path
