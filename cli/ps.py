"""`tandem ps`: what runs in the local stacks of this user."""

import argparse
import asyncio
import json
import sys
from collections.abc import Sequence
from typing import Any

import msgspec
import psutil

from cli.registered_workers import RegisteredWorkers
from cli.runtime_dir import StackProcess, StackRecord, local_stacks
from services.runtime.redis_client import open_redis

_COLUMNS = ("NAME", "ROLE", "PID", "STATE", "MEMORY", "ADDRESS", "LOAD")


def run(argv: Sequence[str]) -> int:
    """Prints a table, or with `--json` a list of stacks."""
    parser = argparse.ArgumentParser(
        prog="tandem ps", description="List the processes of this user's local stacks."
    )
    parser.add_argument("--json", action="store_true", help="a JSON list of stacks")
    arguments = parser.parse_args(argv)
    stacks = asyncio.run(describe_all(local_stacks()))
    if arguments.json:
        sys.stdout.write(json.dumps(stacks, indent=2) + "\n")
    else:
        sys.stdout.write(_table(stacks))
    return 0


async def describe_all(records: Sequence[StackRecord]) -> list[dict[str, Any]]:
    """What `--json` prints of these stacks."""
    return [await _describe(record) for record in records]


async def _describe(record: StackRecord) -> dict[str, Any]:
    redis = open_redis(record.redis_url)
    workers = RegisteredWorkers(redis)
    try:
        processes = [await _describe_process(process, workers) for process in record.processes]
    finally:
        await redis.aclose()
    return {
        "supervisor_pid": record.supervisor_pid,
        "started_unix_s": record.started_unix_s,
        "model": record.model,
        "url": record.url,
        "processes": processes,
    }


async def _describe_process(process: StackProcess, workers: RegisteredWorkers) -> dict[str, Any]:
    described: dict[str, Any] = {
        "name": process.name,
        "role": process.role,
        "pid": process.pid,
        "state": process.state,
        "restarts": process.restarts,
        "addresses": {} if process.address is None else {"service": process.address},
        "memory_bytes": _memory_bytes(process.pid),
        "load": None,
    }
    if process.worker_id is None:
        return described
    record = await workers.record(process.worker_id)
    if record is not None and record.pid == process.pid:
        load = await workers.load(process.worker_id)
        described["addresses"] = {
            "control": record.ref.control_address,
            "metrics": record.metrics_address,
        }
        described["incarnation"] = record.ref.incarnation
        described["num_blocks"] = record.num_blocks
        described["load"] = None if load is None else msgspec.to_builtins(load)
        if load is not None and load.draining:
            described["state"] = "draining"
    return described


def _memory_bytes(pid: int | None) -> int | None:
    try:
        return None if pid is None else psutil.Process(pid).memory_info().rss
    except psutil.NoSuchProcess:
        return None


def _table(stacks: Sequence[dict[str, Any]]) -> str:
    if not stacks:
        return "No stack runs here.\n"
    blocks: list[str] = []
    for stack in stacks:
        rows = [_COLUMNS, *(_row(process) for process in stack["processes"])]
        widths = [max(len(row[index]) for row in rows) for index in range(len(_COLUMNS))]
        lines = [
            "  ".join(f"{cell:<{w}}" for cell, w in zip(row, widths, strict=True)).rstrip()
            for row in rows
        ]
        blocks.append("\n".join([f"{stack['model']} at {stack['url']}", *lines]))
    return "\n\n".join(blocks) + "\n"


def _row(process: dict[str, Any]) -> tuple[str, ...]:
    load = process["load"]
    memory = process["memory_bytes"]
    return (
        process["name"],
        process["role"],
        str(process["pid"] or "-"),
        process["state"],
        "-" if memory is None else f"{memory / 2**20:,.0f} MiB",
        next(iter(process["addresses"].values()), "-"),
        "-" if load is None else f"{load['num_running']} running, {load['num_waiting']} waiting",
    )
