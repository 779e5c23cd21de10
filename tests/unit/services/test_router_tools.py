"""Tools and thoughts over HTTP, with a worker that repeats the prompt: that is what it says."""

import json
from collections.abc import AsyncIterator
from typing import Any

import openai
import pytest
import pytest_asyncio
from router_stack import MODEL, RouterStack, open_router_stack

from protocol.errors import StartupError

pytestmark = pytest.mark.asyncio(loop_scope="module")

CHAT = "/v1/chat/completions"
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}}
WEATHER = {"type": "function", "function": {"name": "get_weather", "parameters": PARAMETERS}}
TIME = {"type": "function", "function": {"name": "get_time"}}
CALL = '<tool_call>{"name": "get_weather", "arguments": {"city": "Köln"}}</tool_call>'
SECOND = '<tool_call>{"name": "get_time", "arguments": {}}</tool_call>'
# What the toy model's template puts before the user's words.
BEFORE = "<|im_start|>user\n"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def stack(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[RouterStack]:
    async with open_router_stack(
        tmp_path_factory.mktemp("router"),
        enable_auto_tool_choice=True,
        tool_call_parser="hermes",
        reasoning_parser="qwen3",
    ) as stack:
        await stack.add_worker()
        yield stack


def says(text: str, **fields: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": f"{text}END"}]
    return {"model": MODEL, "messages": messages, "stop": "END", "max_tokens": 300, **fields}


async def ask(stack: RouterStack, **body: Any) -> dict[str, Any]:
    answer = await stack.post(CHAT, body)
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]


async def test_calls_are_answered_as_tool_calls(stack: RouterStack) -> None:
    choice = await ask(stack, **says(CALL + SECOND, tools=[WEATHER, TIME]))
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] == BEFORE
    calls = choice["message"]["tool_calls"]
    assert [call["function"]["name"] for call in calls] == ["get_weather", "get_time"]
    assert json.loads(calls[0]["function"]["arguments"]) == {"city": "Köln"}
    assert len({call["id"] for call in calls}) == 2


async def test_words_are_answered_as_words(stack: RouterStack) -> None:
    choice = await ask(stack, **says("Just words <tool", tools=[WEATHER]))
    assert choice["finish_reason"] == "stop"
    assert choice["message"]["content"] == f"{BEFORE}Just words <tool"
    assert "tool_calls" not in choice["message"]


@pytest.mark.parametrize("fields", [{}, {"tools": [WEATHER], "tool_choice": "none"}])
async def test_without_tools_nothing_is_looked_for(
    stack: RouterStack, fields: dict[str, Any]
) -> None:
    choice = await ask(stack, **says(CALL, **fields))
    assert choice["message"]["content"] == f"user\n{CALL}"
    assert choice["finish_reason"] == "stop"


async def test_a_stream_says_what_the_whole_answer_says(stack: RouterStack) -> None:
    client = openai.AsyncOpenAI(base_url=f"{stack.url}/v1", api_key="none")
    body = says(f"Let me see. {CALL} Done.{SECOND}", tools=[WEATHER, TIME])
    whole = await ask(stack, **body)
    content, calls, reason = "", {}, None
    async with await client.chat.completions.create(**body, stream=True) as stream:
        async for chunk in stream:
            delta = chunk.choices[0].delta
            content += delta.content or ""
            reason = chunk.choices[0].finish_reason or reason
            for piece in delta.tool_calls or []:
                assert piece.function is not None
                name, arguments = calls.get(piece.index, ("", ""))
                calls[piece.index] = (
                    name + (piece.function.name or ""),
                    arguments + (piece.function.arguments or ""),
                )
    await client.close()
    assert content == whole["message"]["content"] == f"{BEFORE}Let me see.  Done."
    assert reason == whole["finish_reason"] == "tool_calls"
    assert list(calls.values()) == [
        (call["function"]["name"], call["function"]["arguments"])
        for call in whole["message"]["tool_calls"]
    ]


async def test_every_output_is_read_by_itself(stack: RouterStack) -> None:
    answer = await stack.post(CHAT, says(CALL, tools=[WEATHER], n=3))
    messages = [choice["message"] for choice in answer.json()["choices"]]
    assert [len(message["tool_calls"]) for message in messages] == [1, 1, 1]


async def test_usage_and_logprobs_survive_what_is_held_back(stack: RouterStack) -> None:
    body = says(CALL, tools=[WEATHER], logprobs=True, stream_options={"include_usage": True})
    events = await stack.stream(CHAT, body)
    assert events[-1]["usage"]["completion_tokens"] > len(CALL)
    logprobs = [e["choices"][0]["logprobs"] for e in events if e["choices"]]
    num_logprobs = sum(len(found["content"]) for found in logprobs if found)
    assert num_logprobs == events[-1]["usage"]["completion_tokens"]


async def test_one_call_at_most_ends_the_output_behind_it(stack: RouterStack) -> None:
    body = says(f"One. {CALL} Two.{SECOND}", tools=[WEATHER, TIME], parallel_tool_calls=False)
    answer = await stack.post(CHAT, body)
    [choice] = answer.json()["choices"]
    [call] = choice["message"]["tool_calls"]
    assert call["function"]["name"] == "get_weather"
    assert choice["message"]["content"] == f"{BEFORE}One. "
    assert choice["finish_reason"] == "tool_calls"
    num_tokens = answer.json()["usage"]["completion_tokens"]
    assert num_tokens == len(f"\0user\nOne. {CALL}".encode()), "nothing is generated behind it"
    events = await stack.stream(CHAT, body)
    deltas = [event["choices"][0]["delta"] for event in events]
    assert [d["tool_calls"][0]["index"] for d in deltas if "tool_calls" in d] == [0]
    assert "".join(d.get("content") or "" for d in deltas) == f"{BEFORE}One. "
    assert events[-1]["choices"][0]["finish_reason"] == "tool_calls"
    assert stack.service.dispatcher.num_flights == 0


async def test_without_a_call_one_at_most_changes_nothing(stack: RouterStack) -> None:
    words = says("Just words <tool_call>{}</tool_call>!", tools=[WEATHER])
    assert await ask(stack, **words) == await ask(stack, **words, parallel_tool_calls=False)


def allowed(mode: str, *names: str) -> dict[str, Any]:
    tools = [{"type": "function", "function": {"name": name}} for name in names]
    return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": tools}}


def called(choice: dict[str, Any]) -> list[str]:
    return [call["function"]["name"] for call in choice["message"].get("tool_calls") or ()]


async def test_only_allowed_tools_are_called(stack: RouterStack) -> None:
    body = says(CALL + SECOND, tools=[WEATHER, TIME])
    both = await ask(stack, **body, tool_choice=allowed("auto", "get_time", "get_weather"))
    assert called(both) == ["get_weather", "get_time"]
    one = await ask(stack, **body, tool_choice=allowed("auto", "get_time"))
    assert called(one) == ["get_time"]
    assert one["message"]["content"] == BEFORE + CALL, "another tool's call is no call"
    none = await ask(
        stack, **says(CALL, tools=[WEATHER, TIME], tool_choice=allowed("auto", "get_time"))
    )
    assert (called(none), none["finish_reason"]) == ([], "stop")
    first = await ask(
        stack, **body, tool_choice=allowed("auto", "get_time"), parallel_tool_calls=False
    )
    assert called(first) == ["get_time"]


@pytest.mark.parametrize("several", [True, False])
async def test_a_required_call_is_held_to_the_allowed_tools(
    stack: RouterStack, *, several: bool
) -> None:
    body = says("x", tools=[WEATHER, TIME], max_tokens=2, parallel_tool_calls=several)
    worker = stack.workers[0]
    worker.requests.clear()
    await ask(stack, **body, tool_choice=allowed("required", "get_time"))
    await ask(stack, **body | {"tools": [TIME]}, tool_choice="required")
    await ask(stack, **body, tool_choice="required")
    held, alone, free = [request.sampling.structured_outputs for request in worker.requests]
    assert held is not None
    assert held == alone != free


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"tool_choice": "required"}, "tool_choice"),
    ({"tools": [], "tool_choice": "required"}, "tool_choice"),
    ({"tools": [WEATHER], "tool_choice": "sometimes"}, "tool_choice"),
    (
        {"tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": "f"}}},
        "tool_choice",
    ),
    ({"tool_choice": allowed("auto", "get_time")}, "tool_choice"),
    (
        {"tools": [WEATHER], "tool_choice": allowed("auto")},
        "tool_choice.allowed_tools.tools",
    ),
    (
        {"tools": [WEATHER], "tool_choice": allowed("auto", "get_weather", "get_time")},
        "tool_choice.allowed_tools.tools[1].function.name",
    ),
    (
        {"tools": [WEATHER], "tool_choice": allowed("maybe", "get_weather")},
        "tool_choice.allowed_tools.mode",
    ),
    ({"tools": [WEATHER], "tool_choice": {"type": "allowed_tools"}}, "tool_choice.allowed_tools"),
    ({"tools": [WEATHER], "tool_choice": {"type": "function"}}, "tool_choice.function"),
    ({"tools": [WEATHER], "tool_choice": {"type": "custom"}}, "tool_choice.type"),
    ({"tools": [{"type": "function"}]}, "tools[0].function"),
    ({"tools": [WEATHER, WEATHER]}, "tools[1].function.name"),
    ({"tools": [{"function": {"name": ""}}]}, "tools[0].function.name"),
    ({"tools": [TIME] * 200}, "tools"),
    (
        {
            "tools": [{"function": {"name": "f", "parameters": {"type": "nothing"}}}],
            "tool_choice": "required",
        },
        "tools",
    ),
    (
        {
            "tools": [WEATHER, {"function": {"name": "f", "parameters": {"$defs": 1}}}],
            "tool_choice": allowed("required", "f"),
        },
        "tools[1].function.parameters.$defs",
    ),
    (
        {"tools": [WEATHER], "tool_choice": "required", "guided_choice": ["a"]},
        "guided_choice",
    ),
]


@pytest.mark.parametrize(("fields", "field"), REFUSED, ids=lambda value: str(value)[:60])
async def test_what_makes_no_sense_is_a_400_that_names_the_field(
    stack: RouterStack, fields: dict[str, Any], field: str
) -> None:
    answer = await stack.post(CHAT, says("hi", **fields))
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == field


async def test_auto_choice_has_to_be_enabled(tmp_path: Any) -> None:
    async with open_router_stack(tmp_path) as plain:
        await plain.add_worker()
        for choice in (None, allowed("auto", "get_weather")):
            answer = await plain.post(CHAT, says("hi", tools=[WEATHER], tool_choice=choice))
            assert answer.status_code == 400
            assert answer.json()["error"]["param"] == "tool_choice"
            assert "--enable-auto-tool-choice" in answer.json()["error"]["message"]
        choice = allowed("required", "get_weather")
        await ask(plain, **says("hi", tools=[WEATHER], tool_choice=choice))


async def test_auto_choice_needs_a_parser(tmp_path: Any) -> None:
    with pytest.raises(StartupError, match="--tool-call-parser"):
        async with open_router_stack(tmp_path, enable_auto_tool_choice=True):
            pass


async def test_thoughts_are_answered_apart(tmp_path: Any) -> None:
    async with open_router_stack(tmp_path, reasoning_parser="deepseek_r1") as stack:
        await stack.add_worker()
        choice = await ask(stack, **says("hmm</think>yes"))
        assert choice["message"]["reasoning_content"] == "user\nhmm"
        assert choice["message"]["reasoning"] == "user\nhmm"
        assert choice["message"]["content"] == "yes"
        events = await stack.stream(CHAT, says("hmm</think>yes"))
        deltas = [event["choices"][0]["delta"] for event in events]
        for name in ("reasoning_content", "reasoning"):
            assert "".join(d.get(name, "") for d in deltas) == "user\nhmm"
        assert "".join(d.get("content", "") for d in deltas) == "yes"
