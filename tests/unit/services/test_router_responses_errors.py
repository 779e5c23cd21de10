"""What /v1/responses refuses, doesn't find or can't finish, and how it says so."""

from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio
from router_stack import RouterStack, open_router_stack, parse_named_events, until

from services.router.noop_worker import NoopBehaviour

pytestmark = pytest.mark.asyncio(loop_scope="module")

RESPONSES = "/v1/responses"
WEATHER = {"type": "function", "name": "get_weather"}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def stack(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[RouterStack]:
    async with open_router_stack(
        tmp_path_factory.mktemp("router"), enable_auto_tool_choice=True, tool_call_parser="hermes"
    ) as stack:
        await stack.add_worker()
        yield stack


USER = {"role": "user", "content": "x"}
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"top_logprobs": 21}, "top_logprobs"),
    ({"top_logprobs": -1}, "top_logprobs"),
    ({"input": []}, "input"),
    ({"input": 3}, "input"),
    ({"input": [{"role": "judge", "content": "x"}]}, "input[0].role"),
    ({"input": [{"content": "x"}]}, "input[0].role"),
    ({"input": [{"role": "user"}]}, "input[0].content"),
    ({"input": [USER, {"type": "computer_call"}]}, "input[1].type"),
    (
        {"input": [{"role": "user", "content": [{"type": "input_image"}]}]},
        "input[0].content[0].type",
    ),
    (
        {"input": [{"role": "user", "content": [{"type": "input_text"}]}]},
        "input[0].content[0].text",
    ),
    ({"input": [{"type": "function_call", "call_id": "a", "name": "f"}]}, "input[0].arguments"),
    ({"input": [{"type": "function_call_output", "call_id": "a"}]}, "input[0].output"),
    (
        {"input": [{"type": "function_call", "call_id": "a", "name": "f", "arguments": "{"}]},
        "input",
    ),
    ({"max_output_tokens": 0}, "max_output_tokens"),
    ({"temperature": -1}, "temperature"),
    ({"top_k": -2}, "top_k"),
    ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
    ({"tools": [{"type": "function"}]}, "tools[0].name"),
    ({"tools": [{"type": "function", "name": ""}]}, "tools[0].name"),
    ({"tools": [WEATHER, WEATHER]}, "tools[1].name"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"tools": [WEATHER], "tool_choice": {"type": "file_search"}}, "tool_choice.type"),
    ({"tools": [WEATHER], "tool_choice": {"type": "function"}}, "tool_choice.name"),
    ({"tools": [WEATHER], "tool_choice": {"type": "allowed_tools"}}, "tool_choice.tools"),
    (
        {"tools": [WEATHER], "tool_choice": {"type": "allowed_tools", "tools": []}},
        "tool_choice.mode",
    ),
    (
        {
            "tools": [WEATHER],
            "tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": []},
        },
        "tool_choice.tools",
    ),
    (
        {
            "tools": [WEATHER],
            "tool_choice": {
                "type": "allowed_tools",
                "mode": "auto",
                "tools": [{"type": "function", "name": "f"}],
            },
        },
        "tool_choice.tools[0].name",
    ),
    (
        {
            "tools": [WEATHER],
            "tool_choice": {
                "type": "allowed_tools",
                "mode": "auto",
                "tools": [{"type": "mcp", "server_label": "x"}],
            },
        },
        "tool_choice.tools[0].type",
    ),
    ({"text": {"format": {"type": "xml"}}}, "text.format.type"),
    ({"text": {"format": {"type": "json_schema"}}}, "text.format.schema"),
    (
        {"text": {"format": {"type": "json_schema", "schema": {"type": "nothing"}}}},
        "text.format",
    ),
    ({"text": {"verbosity": "low"}}, "text.verbosity"),
    ({"include": ["file_search_call.results"]}, "include[0]"),
    ({"include": ["message.output_text.logprobs"], "top_logprobs": 99}, "top_logprobs"),
    ({"truncation": "sometimes"}, "truncation"),
    ({"metadata": {"a": 1}}, "metadata[...]"),
    ({"background": 1}, "background"),
    ({"conversation": "c"}, "conversation"),
    ({"prompt": {"id": "p"}}, "prompt"),
    ({"max_tool_calls": 2}, "max_tool_calls"),
    ({"service_tier": "flex"}, "service_tier"),
    ({"previous_response_id": "resp_no"}, "previous_response_id"),
]


@pytest.mark.parametrize(("fields", "param"), REFUSED, ids=str)
@pytest.mark.parametrize("stream", [False, True])
async def test_what_is_wrong_is_named(
    stack: RouterStack, fields: dict[str, Any], param: str, *, stream: bool
) -> None:
    response = await stack.post(RESPONSES, {"input": "x", "stream": stream, **fields})
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == param
    assert response.json()["error"]["message"]


async def test_unknown_models_and_ids_are_not_found(stack: RouterStack) -> None:
    answers = [
        await stack.post(RESPONSES, {"input": "x", "model": "gpt-9"}),
        await stack.client.get(f"{RESPONSES}/resp_no"),
        await stack.client.delete(f"{RESPONSES}/resp_no"),
    ]
    assert [answer.status_code for answer in answers] == [404, 404, 404]
    streamed = await stack.client.get(f"{RESPONSES}/resp_no", params={"stream": "true"})
    assert streamed.json()["error"]["param"] == "stream"


async def test_a_stream_that_fails_says_so(tmp_path_factory: pytest.TempPathFactory) -> None:
    settings = {"request_timeout_s": 2.0}
    async with open_router_stack(tmp_path_factory.mktemp("router"), **settings) as stack:
        await stack.add_worker(behaviour=NoopBehaviour(stall_at=3))
        response = await stack.post(RESPONSES, {"input": "x", "stream": True})
        events = parse_named_events(response.content)
        assert events[-1]["type"] == "response.failed"
        assert events[-1]["response"]["error"]["code"] == "server_error"
        assert events[-1]["response"]["status"] == "failed"
        await until(lambda: stack.service.dispatcher.num_flights == 0)
