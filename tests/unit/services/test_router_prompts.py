"""How prompts are encoded: what no worker could take, and who waits for long ones."""

import json
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from router_stack import RouterStack, open_router_stack, write_toy_model

from services.router.openai.prompts import MAX_PROMPTS
from services.router.openai.template_input import MAX_MESSAGES

# More tokens than the model has embeddings for, as published tokenizers have them.
UNKNOWN = "<|unknown|>"


@pytest.fixture
async def stack(tmp_path: Path) -> AsyncIterator[RouterStack]:
    model_dir = write_toy_model(tmp_path, marks=(UNKNOWN,))
    config = json.loads((model_dir / "config.json").read_text())
    (model_dir / "config.json").write_text(json.dumps(config | {"vocab_size": 258}))
    async with open_router_stack(tmp_path, model_dir=model_dir) as stack:
        await stack.add_worker()
        yield stack


@pytest.mark.parametrize(
    ("path", "body", "field"),
    [
        ("/v1/completions", {"prompt": f"a{UNKNOWN}b"}, "prompt"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": UNKNOWN}]}, "messages"),
        ("/v1/responses", {"input": UNKNOWN}, "input"),
        ("/v1/embeddings", {"input": ["a", UNKNOWN]}, "input"),
        ("/v1/score", {"text_1": "a", "text_2": UNKNOWN}, "text_2"),
    ],
)
async def test_tokens_without_embeddings_come_to_no_worker(
    stack: RouterStack, path: str, body: dict[str, Any], field: str
) -> None:
    response = await stack.post(path, body)
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["param"] == field
    assert UNKNOWN in error["message"]
    assert not stack.workers[0].requests


async def test_what_is_only_counted_may_have_them(stack: RouterStack) -> None:
    response = await stack.post("/tokenize", {"prompt": UNKNOWN})
    assert response.json()["tokens"] == [258]


@pytest.fixture
def threads(stack: RouterStack, monkeypatch: pytest.MonkeyPatch) -> set[threading.Thread]:
    """Those that encode."""
    tokenizer = stack.model.tokenizer
    encode, threads = tokenizer.encode, set[threading.Thread]()

    def watched(text: str, *, add_special_tokens: bool = True) -> list[int]:
        threads.add(threading.current_thread())
        return encode(text, add_special_tokens=add_special_tokens)

    monkeypatch.setattr(tokenizer, "encode", watched)
    return threads


async def test_many_short_texts_are_encoded_beside_the_event_loop(
    stack: RouterStack, threads: set[threading.Thread]
) -> None:
    texts = [f"{i:0200}" for i in range(MAX_PROMPTS)]
    response = await stack.post("/v1/completions", {"prompt": texts, "max_tokens": 1})
    assert response.status_code == 200, response.text
    assert threads
    assert threading.main_thread() not in threads
    worker = stack.workers[0]
    assert len({tuple(request.token_ids) for request in worker.requests}) == MAX_PROMPTS
    assert {len(request.token_ids) for request in worker.requests} == {200}
    threads.clear()
    await stack.post("/v1/completions", {"prompt": texts[:2], "max_tokens": 1})
    assert threads == {threading.main_thread()}, "a thread isn't worth it"


CALL = {"function": {"name": "f", "arguments": '{"a": 1}'}}
LENGTHY: list[dict[str, Any]] = [
    {"messages": [{"role": "user", "content": ""}] * 65},
    {"messages": [{"role": "assistant", "content": "a", "tool_calls": [CALL]}]},
    {"tools": [{"function": {"name": "f"}}]},
    {"documents": [{"text": "a"}]},
    {"chat_template_kwargs": {"a": "b"}},
]


@pytest.mark.parametrize("fields", LENGTHY, ids=lambda fields: str(fields)[:40])
async def test_chats_of_any_size_are_rendered_beside_the_event_loop(
    stack: RouterStack, threads: set[threading.Thread], fields: dict[str, Any]
) -> None:
    chat = {"messages": [{"role": "user", "content": "hi"}]}
    assert (await stack.post("/tokenize", chat)).status_code == 200
    assert threads == {threading.main_thread()}
    threads.clear()
    response = await stack.post("/tokenize", chat | fields)
    assert response.status_code == 200, response.text
    assert threads
    assert threading.main_thread() not in threads


async def test_arguments_nested_without_end_are_refused(stack: RouterStack) -> None:
    call = {"function": {"name": "f", "arguments": "[" * 10_000}}
    messages = [{"role": "assistant", "content": "a", "tool_calls": [call]}]
    for path in ("/v1/chat/completions", "/tokenize"):
        response = await stack.post(path, {"messages": messages})
        assert response.status_code == 400, response.text
        assert response.json()["error"]["param"] == "messages"


async def test_messages_are_counted_before_anything_is_made_of_them(stack: RouterStack) -> None:
    messages = [{"role": "user", "content": ""}] * (MAX_MESSAGES + 1)
    for path in ("/v1/chat/completions", "/tokenize"):
        error = (await stack.post(path, {"messages": messages})).json()["error"]
        assert error["param"] == "messages"
        assert f"at most {MAX_MESSAGES}" in error["message"]
