"""A run's figures for people, and files of them for programs."""

import os
import platform
import subprocess
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec

from loadtest.config import BenchConfig
from loadtest.results import Distribution, RequestResult, Summary
from protocol.errors import StartupError

_SECRET_FIELDS = ("api_key",)


def format_summary(summary: Summary) -> str:
    """The table that ends a run."""
    rates = (
        f"{summary.num_completed} of {summary.num_requests} requests in "
        f"{summary.duration_s:.2f} s: {summary.output_tokens_per_s:,.1f} output tok/s, "
        f"{summary.prompt_tokens_per_s:,.1f} prompt tok/s, {summary.requests_per_s:.2f} requests/s"
    )
    sizes = (
        f"mean prompt {summary.mean_prompt_tokens:,.0f} tokens, "
        f"mean output {summary.mean_output_tokens:,.0f}"
    )
    if summary.cached_tokens_share is not None:
        sizes += f", {summary.cached_tokens_share:.0%} of prompts from cache"
    lines = [
        rates,
        sizes,
        "",
        f"{'ms':<24}{'mean':>10}{'p50':>10}{'p90':>10}{'p95':>10}{'p99':>10}{'max':>10}",
        *_rows(
            ("time to first token", summary.ttft_ms),
            ("time per output token", summary.tpot_ms),
            ("between pieces", summary.itl_ms),
            ("end to end", summary.e2e_ms),
        ),
    ]
    lines += [f"failed: {count} × {error}" for error, count in sorted(summary.errors.items())]
    return "\n".join(lines)


def _rows(*named: tuple[str, Distribution | None]) -> Iterable[str]:
    for name, values in named:
        if values is not None:
            figures = (values.mean, *values.percentiles.values(), values.maximum)
            yield f"{name:<24}" + "".join(f"{figure:>10,.1f}" for figure in figures)


def write_summary(path: Path, summary: Summary, config: BenchConfig, model: str) -> None:
    """The summary, with what is needed to run it again, as JSON. StartupError if it can't."""
    settings = {
        name: getattr(config, name)
        for name in BenchConfig.__dataclass_fields__
        if name not in _SECRET_FIELDS
    }
    content: dict[str, Any] = {
        "model": model,
        "settings": settings,
        "summary": msgspec.to_builtins(summary),
        "machine": machine(),
    }
    _write(path, msgspec.json.format(msgspec.json.encode(content)) + b"\n")


def write_requests(path: Path, results: Sequence[RequestResult]) -> None:
    """A line of JSON for each request. StartupError if it can't be written."""
    _write(path, b"".join(msgspec.json.encode(result) + b"\n" for result in results))


def machine() -> dict[str, Any]:
    """Where and when a figure was taken."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "commit": _commit(),
    }


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _commit() -> str | None:
    """The commit of the checkout that this file belongs to, if it's one."""
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def _write(path: Path, content: bytes) -> None:
    try:
        path.write_bytes(content)
    except OSError as error:
        raise StartupError(f"Can't write {path}: {error.strerror}.") from error
