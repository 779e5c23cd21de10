"""Readers of published traces: sizes and times of real requests, without their texts."""

import csv
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import msgspec

from protocol.decoding import decode
from protocol.errors import StartupError, UnreadableError

_MOONCAKE_BLOCK_LEN = 512


@dataclass(frozen=True, slots=True)
class TraceRequest:
    """One request; `block_ids` name its prompt's blocks of `block_len` tokens, equal if shared."""

    offset_s: float
    input_len: int
    output_len: int
    block_ids: tuple[int, ...] = ()
    block_len: int = _MOONCAKE_BLOCK_LEN


class _MooncakeLine(msgspec.Struct):
    timestamp: float
    input_length: int
    output_length: int
    hash_ids: tuple[int, ...] = ()


_mooncake_lines = msgspec.json.Decoder(_MooncakeLine)


def read_trace(path: Path) -> list[TraceRequest]:
    """All requests of a Mooncake `.jsonl` or an Azure `.csv` trace, in the order of arrival.

    Raises StartupError that names the file and what is wrong with it.
    """
    try:
        with path.open(encoding="utf-8", newline="") as file:
            reader = _azure(file) if path.suffix == ".csv" else _mooncake(file)
            requests = sorted(reader, key=lambda request: request.offset_s)
    except OSError as error:
        raise StartupError(f"Can't read the trace {path}: {error.strerror}.") from error
    except (KeyError, ValueError, UnreadableError) as error:
        raise StartupError(f"{path} is neither a Mooncake nor an Azure trace: {error}.") from error
    if not requests:
        raise StartupError(f"The trace {path} is empty.")
    return requests


def _mooncake(lines: Iterator[str]) -> Iterator[TraceRequest]:
    for line in lines:
        if line.strip():
            entry = decode(_mooncake_lines, line.encode())
            yield TraceRequest(
                entry.timestamp / 1000, entry.input_length, entry.output_length, entry.hash_ids
            )


def _azure(lines: Iterator[str]) -> Iterator[TraceRequest]:
    first: datetime | None = None
    for row in csv.DictReader(lines):
        # Seven decimals, of which Python reads six.
        at = datetime.fromisoformat(row["TIMESTAMP"][:26])
        first = first or at
        yield TraceRequest(
            (at - first).total_seconds(), int(row["ContextTokens"]), int(row["GeneratedTokens"])
        )
