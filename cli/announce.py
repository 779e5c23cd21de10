"""What `tandem serve` says while a stack starts, changes and stops: lines for people or JSON."""

import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import psutil

from cli.supervisor import State, Supervised
from protocol.records import WorkerRecord

_NAME_WIDTH = 10


@dataclass(frozen=True, slots=True)
class Row:
    """One process in the summary of a stack that is ready."""

    name: str
    pid: int
    address: str
    record: WorkerRecord | None = None


class Announcer:
    """Writes to stdout what happens, to stderr what goes wrong; JSON if `json_lines`."""

    def __init__(self, *, json_lines: bool) -> None:
        self._json_lines = json_lines
        self._start_s = time.monotonic()
        self._ended_s: dict[str, float] = {}

    def say(self, event: str, text: str) -> None:
        """One line about `event`."""
        self._write(sys.stdout.write, {"event": event, "message": text}, text)
        sys.stdout.flush()

    def changed(self, one: Supervised, detail: str) -> None:
        """A process' new state, where it is worth a line; ready after its end if it had one."""
        fields = {"event": one.state.value, "process": one.name, "pid": one.pid, "detail": detail}
        if one.state is State.READY:
            after_s = time.monotonic() - self._ended_s.get(one.name, self._start_s)
            self._write(
                sys.stdout.write, fields, f"  {one.name:<{_NAME_WIDTH}} ready after {after_s:.1f} s"
            )
            sys.stdout.flush()
        elif one.state is State.RESTARTING:
            self._ended_s[one.name] = time.monotonic()
            self._write(sys.stderr.write, fields, f"tandem: {one.name} {detail}.")

    def ready(self, *, model: str, url: str, rows: Sequence[Row]) -> None:
        """What runs where, and the URL."""
        after_s = time.monotonic() - self._start_s
        if self._json_lines:
            processes = [{"name": r.name, "pid": r.pid, "address": r.address} for r in rows]
            fields = {"event": "stack_ready", "model": model, "url": url, "after_s": after_s}
            self._write(sys.stdout.write, fields | {"processes": processes}, "")
        else:
            lines = [f"Serving {model}", *_describe(rows)]
            lines.append(f"Ready after {after_s:.1f} s: {url}/v1  (Ctrl-C stops)")
            sys.stdout.write("\n".join(lines) + "\n")
        sys.stdout.flush()

    def _write(self, write: Callable[[str], int], fields: Mapping[str, object], text: str) -> None:
        write((json.dumps(fields) if self._json_lines else text) + "\n")


def _describe(rows: Sequence[Row]) -> Iterator[str]:
    width = max(len(row.address) for row in rows)
    for row in rows:
        try:
            memory = f"{psutil.Process(row.pid).memory_info().rss / 2**20:,.0f} MiB"
        except psutil.NoSuchProcess:
            memory = "ended"
        line = f"  {row.name:<{_NAME_WIDTH}} pid {row.pid:<8} {row.address:<{width}} {memory:>10}"
        yield line if row.record is None else f"{line}  {_describe_blocks(row.record)}"


def _describe_blocks(record: WorkerRecord) -> str:
    layout = record.layout
    if not record.num_blocks:
        return f"texts of up to {record.max_model_len:,} tokens ({layout.dtype})"
    kv_gib = record.num_blocks * layout.block_bytes / 2**30
    return (
        f"{record.num_blocks:,} blocks of {layout.block_size} tokens "
        f"({layout.dtype}, {kv_gib:.2f} GiB)"
    )
