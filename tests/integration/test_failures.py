"""Processes die by kill -9 at every phase: nobody hangs, no block is lost, service goes on."""

import json
import socket
import threading
import time
from collections.abc import Iterator

import httpx
import pytest
from tandem_stack import MODEL, TandemStack, wait_for

ANSWER_DEADLINE_S = 5.0
LONG_PROMPT = list(range(1000, 7000))


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TandemStack]:
    """Small chunks: a long prompt is prefilling and transferring for a while."""
    log = tmp_path_factory.mktemp("stack") / "log"
    with TandemStack(log, "--max-num-batched-tokens", "128", "--disable-log-requests") as running:
        yield running


class Streamed:
    """A streaming request on a thread of its own, as a client sees it."""

    def __init__(self, stack: TandemStack, prompt: list[int], max_tokens: int) -> None:
        self.first_token = threading.Event()
        self.ended = threading.Event()
        self.num_chunks = 0
        self.num_tokens = 0
        self.outcome = "cut off"
        self._url = stack.url
        self._body = {
            "model": MODEL,
            "prompt": prompt,
            "max_tokens": max_tokens,
            "ignore_eos": True,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        try:
            with (
                httpx.Client(base_url=self._url, timeout=120.0) as client,
                client.stream("POST", "/v1/completions", json=self._body) as answer,
            ):
                if answer.status_code != 200:
                    self.outcome = f"status {answer.status_code}"
                    return
                for line in answer.iter_lines():
                    self._take(line)
        except httpx.TransportError as error:
            self.outcome = f"transport error: {error}"
        finally:
            self.ended.set()

    def _take(self, line: str) -> None:
        if not line.startswith("data: "):
            return
        data = line.removeprefix("data: ")
        if data == "[DONE]":
            self.outcome = "done" if self.outcome == "cut off" else self.outcome
            return
        event = json.loads(data)
        if "error" in event:
            self.outcome = "error"
            return
        if event["usage"]:
            self.num_tokens = event["usage"]["completion_tokens"]
        self.num_chunks += 1
        self.first_token.set()


def assert_serves(stack: TandemStack) -> None:
    """The next request gets its tokens."""

    def is_served() -> bool:
        answer = httpx.post(
            f"{stack.url}/v1/completions",
            json={"model": MODEL, "prompt": "Hello", "max_tokens": 4, "temperature": 0},
            timeout=30.0,
        )
        return answer.status_code == 200 and answer.json()["usage"]["completion_tokens"] > 0

    wait_for(is_served, "the next request to be served", 60.0)


def assert_answered_or_goes_on(request: Streamed) -> None:
    """An error or an answer within the deadline, or tokens that go on by a retry, never silence."""
    end_s = time.monotonic() + ANSWER_DEADLINE_S
    seen = request.num_chunks
    while time.monotonic() < end_s and not request.ended.is_set():
        request.ended.wait(0.1)
    assert request.ended.is_set() or request.num_chunks > seen, "the client hangs"
    assert request.ended.wait(60.0), "the client hangs"
    assert request.outcome in ("done", "error") or request.outcome.startswith("status 5")


def wait_computing(stack: TandemStack, worker: str) -> None:
    def is_computing() -> bool:
        load = stack.workers()[worker]["load"]
        return load is not None and load["num_running"] > 0

    wait_for(is_computing, f"{worker} to compute", 30.0, stack.workers)


@pytest.mark.parametrize("victim", ["prefill-0", "decode-0"])
def test_killed_while_prefilling_and_transferring(stack: TandemStack, victim: str) -> None:
    """128-token chunks travel as they are made, so mid-prompt is mid-transfer too."""
    request = Streamed(stack, LONG_PROMPT, max_tokens=4)
    wait_computing(stack, "prefill-0")
    old_pid = stack.kill(victim)
    assert_answered_or_goes_on(request)
    stack.wait_restarted(victim, old_pid)
    assert_serves(stack)
    stack.wait_idle()


@pytest.mark.parametrize("victim", ["prefill-0", "decode-0"])
def test_killed_while_decoding(stack: TandemStack, victim: str) -> None:
    request = Streamed(stack, [1, 2, 3, 4], max_tokens=400)
    assert request.first_token.wait(60.0)
    old_pid = stack.kill(victim)
    if victim == "prefill-0":
        # Decode has all it needs: the stream doesn't notice.
        assert request.ended.wait(60.0)
        assert request.outcome == "done"
        assert request.num_tokens == 400
    else:
        assert_answered_or_goes_on(request)
    stack.wait_restarted(victim, old_pid)
    assert_serves(stack)
    stack.wait_idle()


def test_both_killed_with_requests_of_all_phases(stack: TandemStack) -> None:
    requests = [Streamed(stack, LONG_PROMPT[n:], max_tokens=50) for n in range(0, 5000, 700)]
    requests += [Streamed(stack, [n, 2, 3], max_tokens=300) for n in range(8)]
    wait_computing(stack, "decode-0")
    pids = {name: stack.kill(name) for name in ("decode-0", "prefill-0")}
    for request in requests:
        assert_answered_or_goes_on(request)
    for name, pid in pids.items():
        stack.wait_restarted(name, pid)
    assert_serves(stack)
    stack.wait_idle()


@pytest.mark.parametrize(
    ("worker", "prompt"),
    [("prefill-0", list(range(9000, 15000))), ("decode-0", [1, 2, 3])],
    ids=["prefilling", "decoding"],
)
def test_a_client_that_leaves_frees_both_workers(
    stack: TandemStack, worker: str, prompt: list[int]
) -> None:
    body = json.dumps(
        {"model": MODEL, "prompt": prompt, "max_tokens": 2000, "ignore_eos": True, "stream": True}
    ).encode()
    with socket.create_connection(("127.0.0.1", stack.port)) as client:
        client.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: test\r\n"
            b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body) + body
        )
        wait_computing(stack, worker)
    # `wait_idle` sees what workers report; neither the prompt nor the output can be done by then.
    stack.wait_idle()
    counted = stack.metric("vllm:request_success_total")
    assert_serves(stack)
    assert stack.metric("vllm:request_success_total") >= counted + 1


def test_redis_may_die_while_requests_run(stack: TandemStack) -> None:
    request = Streamed(stack, [1, 2, 3], max_tokens=200)
    assert request.first_token.wait(60.0)
    old_pid = stack.kill("redis")
    assert request.ended.wait(60.0)
    assert request.outcome == "done"
    assert_serves(stack)

    def is_back() -> bool:
        workers = stack.workers().values()
        redis = stack.processes()["redis"]
        return redis["pid"] not in (None, old_pid) and all(w["load"] for w in workers)

    wait_for(is_back, "Redis and its records to come back", 60.0, stack.processes)
    assert_serves(stack)
    stack.wait_idle()
