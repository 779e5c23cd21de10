"""/v1/messages over HTTP, raw and by Anthropic's client, with a worker that repeats the prompt."""

import json
from collections.abc import AsyncIterator
from typing import Any

import anthropic
import msgspec
import pytest
import pytest_asyncio
from anthropic import AsyncAnthropic
from router_stack import MODEL, RouterStack, open_router_stack, parse_named_events

from services.router.messages.bodies import MessagesBody
from services.router.messages.input import chat_body
from services.router.noop_worker import NoopBehaviour

pytestmark = pytest.mark.asyncio(loop_scope="module")

MESSAGES = "/v1/messages"
COUNT = "/v1/messages/count_tokens"
KEY = "secret-key"
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}}
WEATHER: dict[str, Any] = {"name": "get_weather", "input_schema": PARAMETERS}
CALL = '<tool_call>{"name": "get_weather", "arguments": {"city": "Köln"}}</tool_call>'
USER = {"role": "user", "content": "x"}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def stack(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[RouterStack]:
    async with open_router_stack(
        tmp_path_factory.mktemp("router"),
        api_keys=(KEY,),
        enable_auto_tool_choice=True,
        tool_call_parser="hermes",
        reasoning_parser="qwen3",
    ) as stack:
        stack.client.headers["x-api-key"] = KEY
        await stack.add_worker()
        yield stack


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def client(stack: RouterStack) -> AsyncIterator[AsyncAnthropic]:
    async with AsyncAnthropic(base_url=stack.url, api_key=KEY, max_retries=0) as client:
        yield client


def says(text: str, **fields: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": f"{text}END"}]
    body = {"model": MODEL, "messages": messages, "max_tokens": 300, "stop_sequences": ["END"]}
    return body | fields


async def ask(stack: RouterStack, body: dict[str, Any]) -> dict[str, Any]:
    response = await stack.post(MESSAGES, {"messages": [USER], "max_tokens": 2} | body)
    assert response.status_code == 200, response.text
    return response.json()


async def events_of(stack: RouterStack, body: dict[str, Any]) -> list[dict[str, Any]]:
    response = await stack.post(MESSAGES, body | {"stream": True})
    assert response.status_code == 200, response.text
    return parse_named_events(response.content)


async def prompt_of(stack: RouterStack, body: dict[str, Any]) -> str:
    """What the model is given."""
    stack.workers[0].requests.clear()
    await ask(stack, body)
    [request] = stack.workers[0].requests
    return stack.model.tokenizer.decode(request.token_ids, skip_special_tokens=False)


async def test_a_message(stack: RouterStack) -> None:
    answer = await ask(stack, {"messages": [{"role": "user", "content": "hé"}], "max_tokens": 9})
    assert answer.pop("id").startswith("msg_")
    usage = answer.pop("usage")
    assert answer == {
        "type": "message",
        "role": "assistant",
        "model": MODEL,
        "content": [{"type": "text", "text": "user\nhé"}],
        "stop_reason": "max_tokens",
        "stop_sequence": None,
    }
    assert usage["output_tokens"] == 9
    assert usage["input_tokens"] > 9
    assert usage["cache_read_input_tokens"] == 0


async def test_a_stop_sequence_is_named(stack: RouterStack) -> None:
    answer = await ask(stack, says("hello"))
    assert (answer["stop_reason"], answer["stop_sequence"]) == ("stop_sequence", "END")
    assert answer["content"][0]["text"] == "user\nhello"


async def test_turns_become_a_chats_messages(stack: RouterStack) -> None:
    use = {"type": "tool_use", "id": "t", "name": "f", "input": {"a": 1}}
    result = {
        "type": "tool_result",
        "tool_use_id": "t",
        "content": [{"type": "text", "text": "42"}],
    }
    turns = [
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "hm", "signature": ""},
                {"type": "text", "text": "wait"},
                use,
            ],
        },
        {"role": "user", "content": [result, {"type": "text", "text": "go on"}]},
    ]
    system = [{"type": "text", "text": "Obey.", "cache_control": {"type": "ephemeral"}}]
    prompt = await prompt_of(stack, {"messages": turns, "system": system})
    roles = [turn.partition("\n") for turn in prompt.split("<|im_start|>")[1:]]
    assert [(role, text.removesuffix("<|im_end|>\n")) for role, _, text in roles] == [
        ("system", "Obey."),
        ("user", "a\nb"),
        ("assistant", "wait"),
        ("tool", "42"),
        ("user", "go on"),
        ("assistant", ""),
    ]


async def test_an_assistants_last_words_are_continued(stack: RouterStack) -> None:
    prompt = await prompt_of(stack, {"messages": [USER, {"role": "assistant", "content": "I am"}]})
    assert prompt.endswith("<|im_start|>assistant\nI am")


async def test_the_anthropic_client_gets_a_call(client: AsyncAnthropic) -> None:
    message = await client.messages.create(**says(f"Wait. {CALL}", tools=[WEATHER]))
    text, use = message.content
    assert text.type == "text"
    assert text.text.endswith("Wait. ")
    assert use.type == "tool_use"
    assert (use.name, use.input) == ("get_weather", {"city": "Köln"})
    assert message.stop_reason == "tool_use"


async def test_the_anthropic_client_follows_a_stream(client: AsyncAnthropic) -> None:
    async with client.messages.stream(**says(f"Wait. {CALL}", tools=[WEATHER])) as stream:
        texts = [text async for text in stream.text_stream]
        final = await stream.get_final_message()
    assert "".join(texts).endswith("user\nWait. ")
    text, use = final.content
    assert text.type == "text"
    assert use.type == "tool_use"
    assert use.input == {"city": "Köln"}
    assert final.stop_reason == "tool_use"
    assert final.usage.output_tokens > len(CALL)


async def test_a_stream_tells_how_its_content_grows(stack: RouterStack) -> None:
    events = await events_of(stack, says("héllo"))
    kinds = [event["type"] for event in events]
    assert [kind for kind in kinds if kind != "content_block_delta"] == [
        "message_start",
        "content_block_start",
        "content_block_stop",
        "message_delta",
        "message_stop",
    ]
    start, delta = events[0]["message"], events[-2]
    assert (start["content"], start["stop_reason"]) == ([], None)
    assert start["usage"]["input_tokens"] == delta["usage"]["input_tokens"]
    assert delta["delta"] == {"stop_reason": "stop_sequence", "stop_sequence": "END"}
    texts = [event["delta"]["text"] for event in events if event["type"] == "content_block_delta"]
    assert "".join(texts) == "user\nhéllo"


async def test_thoughts_are_content(tmp_path_factory: pytest.TempPathFactory) -> None:
    settings = {"reasoning_parser": "deepseek_r1"}
    async with open_router_stack(tmp_path_factory.mktemp("router"), **settings) as stack:
        await stack.add_worker()
        body = says("hm, hm</think>\n\nYes.")
        thoughts, words = (await ask(stack, body))["content"]
        assert thoughts == {"type": "thinking", "thinking": "user\nhm, hm", "signature": ""}
        assert words == {"type": "text", "text": "\n\nYes."}
        async with (
            AsyncAnthropic(base_url=stack.url, api_key="none") as client,
            client.messages.stream(**body) as stream,
        ):
            final = await stream.get_final_message()
        assert [part.model_dump(exclude_none=True) for part in final.content] == [thoughts, words]


async def test_tool_choices_are_a_chats(stack: RouterStack) -> None:
    stack.workers[0].requests.clear()
    for choice in ({"type": "any"}, {"type": "tool", "name": "get_weather"}, {"type": "none"}):
        await ask(stack, {"tools": [WEATHER], "tool_choice": choice})
    [one, named, none] = [r.sampling.structured_outputs for r in stack.workers[0].requests]
    assert one is not None
    assert "maxItems" not in one.json
    assert named is not None
    assert named.json == PARAMETERS
    assert none is None
    stack.workers[0].requests.clear()
    alone = {"type": "any", "disable_parallel_tool_use": True}
    await ask(stack, {"tools": [WEATHER], "tool_choice": alone})
    assert stack.workers[0].requests[0].sampling.structured_outputs.json["maxItems"] == 1


async def test_one_tool_use_at_most(stack: RouterStack) -> None:
    alone = {"type": "auto", "disable_parallel_tool_use": True}
    answer = await ask(stack, says(f"{CALL}\n{CALL} Done.", tools=[WEATHER], tool_choice=alone))
    assert [part["type"] for part in answer["content"]] == ["text", "tool_use"]
    assert answer["stop_reason"] == "tool_use"


async def test_a_named_tools_call_that_is_cut_off(stack: RouterStack) -> None:
    choice = {"type": "tool", "name": "get_weather"}
    answer = await ask(stack, {"tools": [WEATHER], "tool_choice": choice})
    [use] = answer["content"]
    assert (use["type"], use["name"], use["input"]) == ("tool_use", "get_weather", {})
    assert answer["stop_reason"] == "max_tokens"


async def test_sampling_fields_mean_what_they_mean_in_a_chat(stack: RouterStack) -> None:
    stack.workers[0].requests.clear()
    fields = {"temperature": 0.5, "top_p": 0.25, "top_k": 7, "min_p": 0.125, "seed": 3}
    schema = {"type": "object"}
    output = {"format": {"type": "json_schema", "schema": schema}}
    await ask(stack, {**fields, "priority": -4, "output_config": output})
    [request] = stack.workers[0].requests
    assert {name: getattr(request.sampling, name) for name in fields} == fields
    assert request.priority == -4
    assert request.sampling.structured_outputs.json == schema


@pytest.mark.parametrize(("kind", "thinks"), [("enabled", True), ("disabled", False)])
async def test_templates_are_told_whether_to_think(kind: str, *, thinks: bool) -> None:
    body = {"messages": [USER], "max_tokens": 2, "thinking": {"type": kind, "budget_tokens": 1024}}
    chat = chat_body(msgspec.convert(body, MessagesBody))
    assert chat.chat_template_kwargs == {"enable_thinking": thinks}
    assert chat.continue_final_message is False


async def test_tokens_are_counted_as_they_would_be_sent(
    stack: RouterStack, client: AsyncAnthropic
) -> None:
    body = {"messages": [USER], "system": "Obey."}
    counted = await client.messages.count_tokens(model=MODEL, **body)
    assert counted.input_tokens == (await ask(stack, body))["usage"]["input_tokens"]


async def test_counting_refuses_what_cant_be_asked(stack: RouterStack) -> None:
    response = await stack.post(COUNT, {"messages": [USER], "tools": [{"name": "f"}]})
    assert response.status_code == 400
    assert "`tools[0].input_schema`" in response.json()["error"]["message"]


IMAGE = {"type": "image", "source": {"type": "url", "url": "http://x"}}
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"max_tokens": None}, "max_tokens"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": 10_000}, "messages"),
    ({"messages": None}, "messages"),
    ({"messages": []}, "messages"),
    ({"messages": [{"role": "judge", "content": "x"}]}, "messages[0].role"),
    ({"messages": [{"role": "user"}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": [IMAGE]}]}, "messages[0].content[0].type"),
    (
        {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
        "messages[0].content[0].text",
    ),
    (
        {"messages": [{"role": "user", "content": [{"type": "tool_result"}]}]},
        "messages[0].content[0].tool_use_id",
    ),
    (
        {"messages": [{"role": "assistant", "content": [{"type": "tool_use", "name": "f"}]}]},
        "messages[0].content[0].input",
    ),
    ({"system": [IMAGE]}, "system[0].type"),
    ({"temperature": -1}, "temperature"),
    ({"top_k": -2}, "top_k"),
    ({"stop_sequences": [""]}, "stop_sequences"),
    ({"tools": [{"type": "bash_20250124", "name": "bash"}]}, "tools[0].type"),
    ({"tools": [{"name": "f"}]}, "tools[0].input_schema"),
    ({"tools": [WEATHER, WEATHER]}, "tools[1].name"),
    ({"tool_choice": {"type": "any"}}, "tool_choice"),
    ({"tools": [WEATHER], "tool_choice": {"type": "tool"}}, "tool_choice.name"),
    ({"tools": [WEATHER], "tool_choice": {"type": "never"}}, "tool_choice.type"),
    ({"thinking": {"type": "deeply"}}, "thinking.type"),
    (
        {"output_config": {"format": {"type": "json_schema", "schema": {"type": "nothing"}}}},
        "output_config.format",
    ),
    ({"container": "c"}, "container"),
    ({"mcp_servers": [{"url": "x"}]}, "mcp_servers"),
]


@pytest.mark.parametrize(("fields", "name"), REFUSED, ids=str)
async def test_what_is_wrong_is_named_in_anthropics_shape(
    stack: RouterStack, fields: dict[str, Any], name: str
) -> None:
    body = {"messages": [USER], "max_tokens": 2} | fields
    body = {key: value for key, value in body.items() if value is not None}
    response = await stack.post(MESSAGES, body)
    assert response.status_code == 400, response.text
    assert response.json()["type"] == "error"
    error = response.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert f"`{name}`" in error["message"], error


async def test_the_anthropic_client_knows_every_error(
    stack: RouterStack, client: AsyncAnthropic
) -> None:
    ask_for = {"max_tokens": 2, "messages": [{"role": "user", "content": "x"}]}
    with pytest.raises(anthropic.NotFoundError) as missing:
        await client.messages.create(model="claude-9", **ask_for)
    assert missing.value.body == {
        "type": "error",
        "error": {"type": "not_found_error", "message": "The model `claude-9` does not exist."},
    }
    async with AsyncAnthropic(base_url=stack.url, api_key="no", max_retries=0) as stranger:
        with pytest.raises(anthropic.AuthenticationError):
            await stranger.messages.create(model=MODEL, **ask_for)
    nothing = await stack.client.get(MESSAGES)
    assert (nothing.status_code, nothing.json()["type"]) == (405, "error")


@pytest.mark.parametrize("name", ["authorization", "x-api-key"])
async def test_a_key_comes_in_either_header(stack: RouterStack, name: str) -> None:
    del stack.client.headers["x-api-key"]
    try:
        for key, status in ((KEY, 200), ("no", 401)):
            value = f"Bearer {key}" if name == "authorization" else key
            response = await stack.client.get("/v1/models", headers={name: value})
            assert response.status_code == status
    finally:
        stack.client.headers["x-api-key"] = KEY


async def test_a_stream_that_fails_says_so(tmp_path_factory: pytest.TempPathFactory) -> None:
    settings = {"request_timeout_s": 2.0}
    async with open_router_stack(tmp_path_factory.mktemp("router"), **settings) as stack:
        await stack.add_worker(behaviour=NoopBehaviour(stall_at=3))
        events = await events_of(stack, {"messages": [USER], "max_tokens": 9})
        assert events[0]["type"] == "message_start"
        assert events[-1]["type"] == "error"
        assert events[-1]["error"]["type"] == "timeout_error"


async def test_every_body_is_described(stack: RouterStack) -> None:
    paths = (await stack.client.get("/openapi.json")).json()["paths"]
    for path in (MESSAGES, COUNT, "/v1/responses"):
        content = paths[path]["post"]["requestBody"]["content"]["application/json"]
        assert content["schema"], path
    assert set(paths["/v1/responses/{response_id}"]) == {"get", "delete"}
    json.dumps(paths)
