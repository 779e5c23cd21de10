"""Two routers behind one port: which of them a connection leads to makes no difference."""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from threading import Event
from typing import Any

import httpx
import pytest
from tandem_stack import START_DEADLINE_S, TandemStack, wait_for

SETTINGS = ("--max-model-len", "512", "--num-gpu-blocks-override", "128", "--disable-log-requests")
PROMPT = list(range(1000, 1200))
COMPLETIONS = "/v1/completions"
NUM_CONNECTIONS = 16


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TandemStack]:
    log = tmp_path_factory.mktemp("stack") / "log"
    # Never locally: each request is handed over. In chunks, some of which are pushed meanwhile.
    arguments = ("--routers", "2", "--local-prefill", "never", "--max-num-batched-tokens", "64")
    with TandemStack(log, *SETTINGS, *arguments) as running:
        yield running


def post(stack: TandemStack, path: str, body: dict[str, Any]) -> httpx.Response:
    """Over a connection of its own, which leads to any of the routers."""
    return httpx.post(f"{stack.url}{path}", json=body, timeout=60.0)


def load(stack: TandemStack) -> dict[str, Any]:
    return httpx.get(f"{stack.url}/load", timeout=60.0).json()


def test_settings_are_the_same_at_both(stack: TandemStack) -> None:
    before = httpx.get(f"{stack.url}/load_config").json()["settings"]
    for attempts in range(2, 6):
        answer = post(stack, "/load_config", {"max_attempts": attempts}).json()
        assert answer["num_routers"] == 2
        for _ in range(NUM_CONNECTIONS):
            settings = httpx.get(f"{stack.url}/load_config").json()["settings"]
            assert settings == before | {"max_attempts": attempts}


def test_a_router_that_was_killed_comes_back_with_the_settings(stack: TandemStack) -> None:
    post(stack, "/load_config", {"max_queued_requests": 77})
    old_pid = stack.kill("router-0")

    def is_back() -> bool:
        router = stack.processes()["router-0"]
        return router["pid"] not in (None, old_pid) and router["state"] == "ready"

    wait_for(is_back, "the router to come back", START_DEADLINE_S)
    for _ in range(NUM_CONNECTIONS):
        settings = httpx.get(f"{stack.url}/load_config").json()["settings"]
        assert settings["max_queued_requests"] == 77


def test_requests_are_aborted_by_id_at_their_first_token(stack: TandemStack) -> None:
    """That comes from prefill, while decode may still wait for the last blocks."""
    body = {"prompt": PROMPT, "max_tokens": 200, "ignore_eos": True, "stream": True}
    for i in range(NUM_CONNECTIONS):
        # Another prompt each time, so that there are blocks to transfer.
        body["prompt"] = [2000 + i, *PROMPT]
        with httpx.stream("POST", f"{stack.url}{COMPLETIONS}", json=body, timeout=60.0) as response:
            request_id = response.headers["x-request-id"]
            answer = post(stack, "/abort", {"request_id": request_id})
            assert answer.json()["request_ids"] == [request_id]
            *_, error, end = [line for line in response.iter_lines() if line]
        assert json.loads(error.removeprefix("data: "))["error"]["code"] == "request_aborted"
        assert end == "data: [DONE]"
    assert load(stack)["server_load"] == 0
    stack.wait_idle()


def test_aborts_at_any_moment_of_the_handover_leave_nothing_behind(stack: TandemStack) -> None:
    expected = post(stack, COMPLETIONS, {"prompt": PROMPT, "max_tokens": 8, "temperature": 0})
    num_aborted = num_ended = 0
    with ThreadPoolExecutor(4) as pool:
        for i in range(30):
            bodies = [
                {"prompt": [3000 + 4 * i + j, *PROMPT], "max_tokens": 8, "temperature": 0}
                for j in range(4)
            ]
            asking = [pool.submit(post, stack, COMPLETIONS, body) for body in bodies]
            # Nothing says from outside how far a request is; so each time a bit later.
            Event().wait(0.01 * i)
            aborted = post(stack, "/abort", {"abort_all": True}).json()["num_aborted"]
            statuses = [each.result().status_code for each in asking]
            assert set(statuses) <= {200, 499}
            assert statuses.count(499) == aborted
            num_aborted += aborted
            num_ended += statuses.count(200)
    assert num_aborted
    assert num_ended
    stack.wait_idle()
    again = post(stack, COMPLETIONS, {"prompt": PROMPT, "max_tokens": 8, "temperature": 0})
    assert again.json()["choices"] == expected.json()["choices"]
    stack.wait_idle()
