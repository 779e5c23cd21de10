"""Shared memory that was left behind. Other processes of tests, and their stacks, have theirs."""

import os
from contextlib import suppress
from pathlib import Path


def abandoned_memory() -> set[str]:
    """Files in /dev/shm that no process has."""
    found = {str(path) for path in Path("/dev/shm").iterdir()}
    for process in Path("/proc").glob("[0-9]*"):
        # Many end while they're looked at.
        with suppress(OSError):
            found -= _used(process)
    return found


def own_memory() -> set[str]:
    """Files in /dev/shm that this process has."""
    return {name for name in _used(Path("/proc/self")) if name.startswith("/dev/shm/")}


def own_segments() -> list[str]:
    """System V's, of this process's making."""
    _, *lines = Path("/proc/sysvipc/shm").read_text().splitlines()
    # key, shmid, perms, size, and the pid of the process that made it
    return [line for line in lines if int(line.split()[4]) == os.getpid()]


def _used(process: Path) -> set[str]:
    mapped = {line.split()[-1] for line in (process / "maps").read_text().splitlines()}
    opened: set[str] = set()
    for descriptor in (process / "fd").iterdir():
        with suppress(OSError):
            opened.add(str(descriptor.readlink()))
    return mapped | opened
