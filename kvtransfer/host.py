"""Which host and namespaces this process is in, and how fast one thread copies memory here."""

import socket
import time
from pathlib import Path

from kvtransfer.wire import HostIdentity

_MEMCPY_BYTES = 16 << 20


def host_identity() -> HostIdentity:
    return HostIdentity(
        boot_id=_read(Path("/proc/sys/kernel/random/boot_id")),
        hostname=socket.gethostname(),
        pid_namespace=_link(Path("/proc/self/ns/pid")),
        ipc_namespace=_link(Path("/proc/self/ns/ipc")),
    )


def is_same_host(ours: HostIdentity, theirs: HostIdentity) -> bool:
    """True in two containers of one machine, too: they run on one kernel. Who can't tell what
    host it is on is on another."""
    return bool(ours.boot_id) and ours.boot_id == theirs.boot_id


def memory_access_obstacles(ours: HostIdentity, theirs: HostIdentity) -> list[str]:
    """What keeps two processes of one host from each other's memory, for the operator."""
    compared = (
        ("PID namespaces", ours.pid_namespace, theirs.pid_namespace),
        ("IPC namespaces", ours.ipc_namespace, theirs.ipc_namespace),
    )
    return [f"separate {name}" for name, here, there in compared if here != there]


def measure_memcpy_gb_per_s() -> float:
    """GB/s (10⁹ bytes copied per second) of one thread; takes a few milliseconds."""
    source, target = (memoryview(bytearray(_MEMCPY_BYTES)) for _ in range(2))
    best_s = float("inf")
    for _ in range(4):
        start = time.perf_counter()
        target[:] = source
        best_s = min(best_s, time.perf_counter() - start)
    return _MEMCPY_BYTES / best_s / 1e9


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def _link(path: Path) -> str:
    try:
        return str(path.readlink())
    except OSError:
        return ""
