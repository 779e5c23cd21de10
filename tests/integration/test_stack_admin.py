"""What operators may do, on real workers: one prefill and one decode."""

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from tandem_stack import SETTLE_DEADLINE_S, TandemStack, wait_for

SMALL = ("--max-model-len", "512", "--num-gpu-blocks-override", "128", "--disable-log-requests")
PROMPT = list(range(1000, 1100))
NUM_FULL_BLOCKS = len(PROMPT) // 16


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TandemStack]:
    log = tmp_path_factory.mktemp("stack") / "log"
    # Never locally, so that both workers' caches have something.
    with TandemStack(log, *SMALL, "--local-prefill", "never") as running:
        yield running


def complete(stack: TandemStack, **options: Any) -> dict[str, Any]:
    body = {"prompt": PROMPT, "max_tokens": 4, "temperature": 0} | options
    answer = httpx.post(f"{stack.url}/v1/completions", json=body, timeout=60.0)
    assert answer.status_code == 200, answer.text
    return answer.json()


def num_cached(answer: dict[str, Any]) -> int:
    return (answer["usage"]["prompt_tokens_details"] or {}).get("cached_tokens", 0)


def reset(stack: TandemStack) -> dict[str, Any]:
    answer = httpx.post(f"{stack.url}/reset_prefix_cache", timeout=60.0)
    assert answer.status_code == 200, answer.text
    return answer.json()


def num_known_blocks(stack: TandemStack) -> int:
    """What the workers say they have cached, to whoever looks into Redis."""
    return sum(worker["load"]["num_cached_blocks"] for worker in stack.workers().values())


def test_a_reset_empties_both_caches(stack: TandemStack) -> None:
    first = complete(stack)
    again = complete(stack)
    assert num_cached(again) == NUM_FULL_BLOCKS * 16
    stack.wait_idle()
    answer = reset(stack)
    assert set(answer["workers"]) == {"prefill-0", "decode-0"}
    assert all(count >= NUM_FULL_BLOCKS for count in answer["workers"].values())
    assert answer["num_dropped_blocks"] == sum(answer["workers"].values())
    assert reset(stack)["num_dropped_blocks"] == 0
    wait_for(lambda: num_known_blocks(stack) == 0, "the reports of empty caches", SETTLE_DEADLINE_S)
    third = complete(stack)
    assert num_cached(third) == 0
    assert third["choices"][0]["text"] == first["choices"][0]["text"]
    stack.wait_idle()


def test_what_prefill_had_cached_is_what_a_client_is_told(stack: TandemStack) -> None:
    reset(stack)
    # Of one token only, decode hears nothing.
    assert num_cached(complete(stack, max_tokens=1)) == 0
    first = complete(stack)
    assert num_cached(first) == NUM_FULL_BLOCKS * 16
    with httpx.stream(
        "POST",
        f"{stack.url}/v1/completions",
        json={"prompt": PROMPT, "max_tokens": 4, "stream": True}
        | {"stream_options": {"include_usage": True}},
        timeout=60.0,
    ) as response:
        *_, usage, _ = [line for line in response.iter_lines() if line]
    assert num_cached(json.loads(usage.removeprefix("data: "))) == NUM_FULL_BLOCKS * 16
    stack.wait_idle()


def test_a_reset_leaves_what_runs_alone(stack: TandemStack) -> None:
    options = {"max_tokens": 200, "ignore_eos": True}
    expected = complete(stack, **options)["choices"][0]["text"]
    body = {"prompt": PROMPT, "temperature": 0, "stream": True} | options
    with httpx.stream("POST", f"{stack.url}/v1/completions", json=body, timeout=60.0) as response:
        events = response.iter_lines()
        text = json.loads(next(events).removeprefix("data: "))["choices"][0]["text"]
        reset(stack)
        for event in events:
            if event and event != "data: [DONE]":
                text += json.loads(event.removeprefix("data: "))["choices"][0]["text"]
    assert text == expected
    stack.wait_idle()


def test_an_aborted_request_frees_its_blocks(stack: TandemStack) -> None:
    body = {"prompt": PROMPT, "max_tokens": 400, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", f"{stack.url}/v1/completions", json=body, timeout=60.0) as response:
        events = response.iter_lines()
        next(events)
        abort = {"request_id": response.headers["x-request-id"]}
        answer = httpx.post(f"{stack.url}/abort", json=abort, timeout=60.0)
        assert answer.json()["num_aborted"] == 1
        assert "request_aborted" in "".join(events)
    stack.wait_idle()
