"""Start, crash and end of a whole stack, as its operator sees them."""

import json
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import psutil
import pytest
from shared_memory import abandoned_memory
from tandem_stack import MODEL, SETTLE_DEADLINE_S, START_DEADLINE_S, TandemStack, wait_for

SMALL = ("--max-model-len", "1024", "--num-gpu-blocks-override", "256", "--disable-log-requests")


def serve(*argv: str) -> subprocess.CompletedProcess[str]:
    """A start that fails."""
    return subprocess.run(
        [sys.executable, "-m", "cli", "serve", *argv],
        capture_output=True,
        text=True,
        timeout=START_DEADLINE_S,
        check=False,
    )


@contextmanager
def supervised(*argv: str) -> Iterator[tuple["subprocess.Popen[str]", dict]]:
    """A ready stack's supervisor, and its event that says what runs."""
    process = subprocess.Popen(
        [sys.executable, "-m", "cli", "serve", "--port", "0", "--log-format", "json", *argv],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    events = (json.loads(line) for line in process.stdout if line.startswith("{"))
    try:
        ready = next(event for event in events if event.get("event") == "stack_ready")
        reader = threading.Thread(target=lambda: list(events))
        reader.start()
        yield process, ready
    finally:
        process.kill()
        process.wait()
        reader.join()
        process.stdout.close()


def pids(ready: dict) -> list[int]:
    return [process["pid"] for process in ready["processes"]]


def runtime_directory(ready: dict) -> Path:
    (redis,) = [process for process in ready["processes"] if process["name"] == "redis"]
    return Path(redis["address"].removeprefix("unix://")).parent


def nothing_left(ready: dict) -> bool:
    alive = [pid for pid in pids(ready) if psutil.pid_exists(pid) and not _is_zombie(pid)]
    return not alive and not runtime_directory(ready).exists()


def _is_zombie(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def chat(url: str, **more: object) -> httpx.Response:
    body = {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4}
    return httpx.post(f"{url}/v1/chat/completions", json=body | more, timeout=60.0)


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TandemStack]:
    log = tmp_path_factory.mktemp("stack") / "log"
    with TandemStack(log, *SMALL, "--api-key", "hunter2") as running:
        yield running


def test_ps_tells_who_runs_where_and_how_loaded(stack: TandemStack):
    done = subprocess.run(
        [sys.executable, "-m", "cli", "ps", "--json"], capture_output=True, check=True
    )
    (found,) = [found for found in json.loads(done.stdout) if found["url"] == stack.url]
    processes = {process["name"]: process for process in found["processes"]}
    assert {name: process["role"] for name, process in processes.items()} == {
        "redis": "redis",
        "prefill-0": "prefill",
        "decode-0": "decode",
        "router-0": "router",
    }
    assert all(process["state"] == "ready" for process in processes.values())
    assert all(psutil.pid_exists(process["pid"]) for process in processes.values())
    assert processes["router-0"]["addresses"] == {"service": stack.url}
    assert processes["decode-0"]["num_blocks"] == 256
    assert processes["decode-0"]["addresses"].keys() == {"control", "metrics"}
    assert processes["prefill-0"]["load"]["num_running"] == 0


def test_a_key_is_asked_for_and_in_no_argument_list(stack: TandemStack):
    assert chat(stack.url).status_code == 401
    pid = stack.processes()["router-0"]["pid"]
    assert b"hunter2" not in Path(f"/proc/{pid}/cmdline").read_bytes()


def test_a_port_in_use_is_one_sentence(stack: TandemStack):
    done = serve("--port", str(stack.port))
    assert done.returncode == 2
    assert done.stderr == (
        f"tandem: Port {stack.port} on 127.0.0.1 is in use; choose another one with --port.\n"
    )


@pytest.mark.parametrize("name", ["decode-0", "router-0", "redis"])
def test_what_crashes_comes_back(stack: TandemStack, name: str):
    old_pid = stack.kill(name)

    def is_back() -> bool:
        process = stack.processes().get(name, {"pid": None, "state": ""})
        return process["pid"] not in (None, old_pid) and process["state"] == "ready"

    wait_for(is_back, f"{name} to come back", START_DEADLINE_S, stack.processes)
    assert stack.processes()[name]["restarts"] == 1
    headers = {"Authorization": "Bearer hunter2"}
    wait_for(
        lambda: httpx.get(f"{stack.url}/health", headers=headers).status_code == 200,
        "requests to be served again",
        SETTLE_DEADLINE_S,
    )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_everything(number: signal.Signals):
    before = abandoned_memory()
    with supervised(*SMALL) as (process, ready):
        assert chat(ready["url"]).status_code == 200
        process.send_signal(number)
        assert process.wait(SETTLE_DEADLINE_S) == 0
        assert nothing_left(ready)
        assert abandoned_memory() <= before


def test_kill_9_of_the_supervisor_ends_everything():
    before = abandoned_memory()
    with supervised(*SMALL) as (process, ready):
        process.kill()
        process.wait()
        wait_for(lambda: nothing_left(ready), "everything to end", SETTLE_DEADLINE_S)
        assert abandoned_memory() <= before


def test_a_running_answer_ends_before_the_stack_and_a_second_signal_cuts_it():
    with supervised(*SMALL, "--drain-timeout-s", "100") as (process, ready):
        answers: list[str] = []
        first_token = threading.Event()

        def stream() -> None:
            body = {"model": MODEL, "prompt": "One", "max_tokens": 900, "ignore_eos": True}
            try:
                with httpx.stream(
                    "POST",
                    f"{ready['url']}/v1/completions",
                    json=body | {"stream": True},
                    timeout=100.0,
                ) as response:
                    for line in response.iter_lines():
                        first_token.set()
                        answers.append(line)
            except httpx.TransportError:
                pass
            finally:
                first_token.set()

        client = threading.Thread(target=stream)
        client.start()
        assert first_token.wait(SETTLE_DEADLINE_S)
        seen = len(answers)
        process.send_signal(signal.SIGINT)
        wait_for(lambda: len(answers) > seen + 5, "the answer to go on", SETTLE_DEADLINE_S)
        process.send_signal(signal.SIGINT)
        process.wait(SETTLE_DEADLINE_S)
        assert nothing_left(ready)
        client.join()
        assert "data: [DONE]" not in answers


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (("/nowhere/at/all",), "/nowhere/at/all"),
        (("--redis-url", "redis://127.0.0.1:1/0"), "no Redis at redis://127.0.0.1:1/0"),
        (("--redis-url", "nonsense"), "nonsense"),
        (("--max-num-seqs", "none"), "--max-num-seqs must be a whole number"),
        (("--api-key-file", "/nowhere"), "--api-key-file /nowhere"),
        (("--device", "cuda"), "cuda"),
        (("--max-model-len", "100000000"), "max"),
    ],
)
def test_what_cannot_start_says_why_in_one_sentence_and_leaves_nothing(argv, sentence, tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    done = serve("--port", port, *argv)
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("tandem: ")]
    assert sentence in line
    assert "Traceback" not in done.stdout + done.stderr
