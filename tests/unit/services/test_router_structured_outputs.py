"""Structured outputs as clients ask for them: what is passed on, and what is refused."""

import asyncio
import json
import threading
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
import pytest_asyncio
from router_stack import RouterStack, open_router_stack

from engine.grammar import make_checker
from protocol.errors import InvalidRequestError, StartupError
from protocol.structured_outputs import MAX_GRAMMAR_BYTES, StructuredOutputsParams
from services.router.noop_worker import NoopBehaviour
from services.router.openai.bodies import ChatBody
from services.router.openai.structured_outputs import StructuredOutputs

pytestmark = pytest.mark.asyncio(loop_scope="module")

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
MESSAGES = [{"role": "user", "content": "hi"}]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def stack(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[RouterStack]:
    async with open_router_stack(tmp_path_factory.mktemp("router")) as stack:
        await stack.add_worker()
        yield stack


ASKED: list[tuple[dict[str, Any], StructuredOutputsParams | None]] = [
    ({}, None),
    ({"response_format": {"type": "text"}}, None),
    ({"response_format": {"type": "json_object"}}, StructuredOutputsParams(json_object=True)),
    (
        {
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "x", "strict": True, "schema": SCHEMA},
            }
        },
        StructuredOutputsParams(json=SCHEMA),
    ),
    ({"guided_json": SCHEMA}, StructuredOutputsParams(json=SCHEMA)),
    ({"guided_json": '{"type": "null"}'}, StructuredOutputsParams(json='{"type": "null"}')),
    ({"guided_regex": "a+"}, StructuredOutputsParams(regex="a+")),
    ({"guided_choice": ["a", "b"]}, StructuredOutputsParams(choice=("a", "b"))),
    ({"guided_grammar": 'root ::= "a"'}, StructuredOutputsParams(grammar='root ::= "a"')),
    ({"structured_outputs": {"regex": "a"}}, StructuredOutputsParams(regex="a")),
    ({"structured_outputs": {"json_object": True}}, StructuredOutputsParams(json_object=True)),
    (
        {"guided_regex": "a+", "guided_decoding_backend": "guidance:no-fallback"},
        StructuredOutputsParams(regex="a+"),
    ),
    (
        {"structured_outputs": {"regex": "a", "backend": "auto"}},
        StructuredOutputsParams(regex="a"),
    ),
]


@pytest.mark.parametrize(("fields", "expected"), ASKED, ids=str)
async def test_workers_get_what_was_asked(
    stack: RouterStack, fields: dict[str, Any], expected: StructuredOutputsParams | None
) -> None:
    body = msgspec.convert({"messages": MESSAGES, **fields}, ChatBody)
    found = await stack.service.structured_outputs.read(body)
    assert (found and found[1]) == expected
    assert found is None or found[0] in fields
    answer = await stack.client.post("/v1/chat/completions", json={"messages": MESSAGES, **fields})
    assert answer.status_code == 200, answer.text


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"response_format": "json"}, "response_format"),
    ({"response_format": {"type": "yaml"}}, "response_format.type"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "foo"}}}},
        "response_format",
    ),
    ({"guided_json": "{"}, "guided_json"),
    ({"guided_json": {"$ref": "#/nowhere"}}, "guided_json"),
    ({"guided_json": {"$ref": "https://example.org/schema.json"}}, "guided_json"),
    ({"guided_regex": "("}, "guided_regex"),
    ({"guided_regex": "(?=a)b"}, "guided_regex"),
    ({"guided_regex": "x" * MAX_GRAMMAR_BYTES}, "guided_regex"),
    ({"guided_choice": []}, "guided_choice"),
    ({"guided_choice": ["a", ""]}, "guided_choice"),
    ({"guided_choice": "a"}, "guided_choice"),
    ({"guided_grammar": "start: nowhere"}, "guided_grammar"),
    ({"guided_regex": "a", "guided_choice": ["a"]}, "guided_choice"),
    ({"structured_outputs": {}}, "structured_outputs"),
    ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs"),
    ({"structured_outputs": {"structural_tag": {}}}, "structured_outputs.structural_tag"),
    ({"guided_regex": "a", "guided_decoding_backend": "xgrammar"}, "guided_decoding_backend"),
    ({"structured_outputs": {"regex": "a", "backend": "x"}}, "structured_outputs.backend"),
]


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
@pytest.mark.parametrize(("fields", "field"), REFUSED, ids=lambda value: str(value)[:60])
async def test_what_cannot_be_followed_is_a_400_that_names_the_field(
    stack: RouterStack, path: str, fields: dict[str, Any], field: str
) -> None:
    prompt = {"messages": MESSAGES} if "chat" in path else {"prompt": "hi"}
    answer = await stack.client.post(path, json={**prompt, **fields})
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == field


HOSTILE: list[dict[str, Any]] = [
    {"guided_regex": "((a+)+)+b"},
    {"guided_regex": "(a{1,10000}){1,10000}"},
    {"guided_json": {"$ref": "#"}},
    {"guided_json": {"allOf": [{"$ref": "#"}, {"$ref": "#"}]}},
    {"guided_json": {"type": "string", "pattern": "^(([a-z])+.)+[A-Z]([a-z])+$"}},
    {"guided_grammar": "root ::= root root | root"},
    {"guided_choice": [str(number) for number in range(20_000)]},
]


@pytest.mark.parametrize("fields", HOSTILE, ids=lambda value: str(value)[:60])
async def test_hostile_grammars_are_answered(stack: RouterStack, fields: dict[str, Any]) -> None:
    answer = await stack.client.post("/v1/chat/completions", json={"messages": MESSAGES, **fields})
    assert answer.status_code in (200, 400), answer.text


class StuckChecker:
    """Compiles until it is let go."""

    def __init__(self) -> None:
        self.began, self.goes_on = threading.Event(), threading.Event()
        self.asked: list[StructuredOutputsParams] = []

    def error_of(self, params: StructuredOutputsParams) -> str:
        self.asked.append(params)
        self.began.set()
        self.goes_on.wait()
        return ""

    def close(self) -> None: ...


async def test_grammars_that_nobody_waits_for_are_not_compiled(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("services.router.openai.structured_outputs.COMPILE_TIMEOUT_S", 0.05)
    checker = StuckChecker()
    with ThreadPoolExecutor(1) as executor:
        reader = StructuredOutputs(checker, executor, backend="auto")

        async def ask(regex: str) -> None:
            body = msgspec.convert({"messages": MESSAGES, "guided_regex": regex}, ChatBody)
            with pytest.raises(InvalidRequestError, match="took longer"):
                await reader.read(body)

        await asyncio.gather(ask("a"), ask("b"), ask("c"))
        checker.goes_on.set()
    assert len(checker.asked) == 1, "the others were still waiting for the thread"


async def test_a_missing_library_is_named_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(StartupError, match=r"pip install 'tandem\[xgrammar\]'") as refusal:
        make_checker("xgrammar", Path("tokenizer.json"), vocab_size=9, eos_token_ids=(1,))
    assert "\n" not in str(refusal.value)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def failing(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[RouterStack]:
    """Behind four tokens no grammar can be followed; by then a stream has begun."""
    async with open_router_stack(tmp_path_factory.mktemp("failing")) as stack:
        await stack.add_worker(behaviour=NoopBehaviour(step_s=0.05, fails_at=4))
        yield stack


FORMAT = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}
TOOL = {"type": "function", "function": {"name": "f", "parameters": SCHEMA}}
FAILS: list[tuple[str, dict[str, Any], str]] = [
    ("chat/completions", {"messages": MESSAGES, "response_format": FORMAT}, "response_format"),
    ("chat/completions", {"messages": MESSAGES, "guided_regex": "a+"}, "guided_regex"),
    (
        "chat/completions",
        {"messages": MESSAGES, "tools": [TOOL], "tool_choice": "required"},
        "tools",
    ),
    ("completions", {"prompt": "hi", "n": 2, "guided_choice": ["a"]}, "guided_choice"),
    (
        "responses",
        {"input": "hi", "text": {"format": {"type": "json_schema", "name": "x", "schema": SCHEMA}}},
        "text.format",
    ),
    (
        "messages",
        {
            "messages": MESSAGES,
            "max_tokens": 9,
            "output_config": {"format": {"type": "json_schema", "schema": SCHEMA}},
        },
        "output_config.format",
    ),
]


@pytest.mark.parametrize(("path", "body", "field"), FAILS, ids=lambda value: str(value)[:40])
async def test_a_grammar_that_fails_amid_the_output_is_reported(
    failing: RouterStack, path: str, body: dict[str, Any], field: str
) -> None:
    answer = await failing.client.post(f"/v1/{path}", json=body)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert f"`{field}` can't be followed any further" in error["message"]
    assert error["type"] == "invalid_request_error"
    if path != "messages":
        assert (error["param"], error["code"]) == (field, "output_failed")
    streamed = await failing.client.post(f"/v1/{path}", json={**body, "stream": True})
    assert streamed.status_code == 200, streamed.text
    assert f"`{field}` can't be followed any further" in streamed.text
    assert failing.service.dispatcher.num_flights == 0


async def test_a_stream_tells_of_a_failed_grammar_behind_what_came(tmp_path: Path) -> None:
    body = {"messages": MESSAGES, "guided_regex": "a+", "stream": True}
    events: list[dict[str, Any]] = []
    text = ""
    async with open_router_stack(tmp_path) as stack:
        worker = await stack.add_worker(behaviour=NoopBehaviour(stall_at=4))
        async with stack.client.stream("POST", "/v1/chat/completions", json=body) as response:
            async for line in response.aiter_lines():
                if not line.startswith("data: {"):
                    continue
                events.append(json.loads(line.removeprefix("data: ")))
                for choice in events[-1].get("choices", ()):
                    text += choice["delta"].get("content") or ""
                if text == "use":  # behind a special token, which isn't text
                    worker.behaviour = replace(worker.behaviour, stall_at=None, fails_at=4)
                    worker.wake()
    last = events[-1]
    assert text == "use"
    assert last["error"]["param"] == "guided_regex"
