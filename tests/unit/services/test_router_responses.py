"""/v1/responses over HTTP, raw and by OpenAI's client, with a worker that repeats the prompt."""

import json
from collections.abc import AsyncIterator
from typing import Any

import openai
import pytest
import pytest_asyncio
from openai import AsyncOpenAI
from router_stack import MAX_MODEL_LEN, MODEL, RouterStack, open_router_stack, parse_named_events

pytestmark = pytest.mark.asyncio(loop_scope="module")

RESPONSES = "/v1/responses"
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}}
WEATHER = {"type": "function", "name": "get_weather", "parameters": PARAMETERS}
CALL = '<tool_call>{"name": "get_weather", "arguments": {"city": "Köln"}}</tool_call>'


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


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def client(stack: RouterStack) -> AsyncIterator[AsyncOpenAI]:
    async with AsyncOpenAI(base_url=f"{stack.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def says(text: str, **fields: Any) -> dict[str, Any]:
    body = {"model": MODEL, "input": f"{text}END", "max_output_tokens": 300, "stop": "END"}
    return body | fields


async def ask(stack: RouterStack, body: dict[str, Any]) -> dict[str, Any]:
    response = await stack.post(RESPONSES, body)
    assert response.status_code == 200, response.text
    return response.json()


async def events_of(stack: RouterStack, body: dict[str, Any]) -> list[dict[str, Any]]:
    response = await stack.post(RESPONSES, body | {"stream": True})
    assert response.status_code == 200, response.text
    return parse_named_events(response.content)


async def prompt_of(stack: RouterStack, body: dict[str, Any]) -> str:
    """What the model is given."""
    worker = stack.workers[0]
    worker.requests.clear()
    await ask(stack, {"max_output_tokens": 1, **body})
    [request] = worker.requests
    return stack.model.tokenizer.decode(request.token_ids, skip_special_tokens=False)


async def test_an_answer(stack: RouterStack) -> None:
    answer = await ask(stack, {"input": "hé", "max_output_tokens": 9, "metadata": {"a": "b"}})
    assert answer["object"] == "response"
    assert answer["id"].startswith("resp_")
    [item] = answer["output"]
    assert (item["type"], item["role"], item["status"]) == ("message", "assistant", "incomplete")
    content = {"type": "output_text", "text": "user\nhé", "annotations": [], "logprobs": []}
    assert item["content"] == [content]
    assert answer["status"] == "incomplete"
    assert answer["incomplete_details"] == {"reason": "max_output_tokens"}
    assert (answer["metadata"], answer["store"]) == ({"a": "b"}, True)
    usage = answer["usage"]
    assert usage["output_tokens"] == 9
    assert usage["total_tokens"] == usage["input_tokens"] + 9
    assert usage["input_tokens_details"]["cached_tokens"] == 0


async def test_items_become_a_chats_messages(stack: RouterStack) -> None:
    items = [
        {"role": "developer", "content": [{"type": "input_text", "text": "be brief"}]},
        {"role": "user", "content": "hi"},
        {"type": "reasoning", "id": "rs_1", "summary": [{"type": "summary_text", "text": "x"}]},
        {
            "type": "message",
            "role": "assistant",
            "content": [{"type": "output_text", "text": "hello", "annotations": []}],
        },
        {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c", "output": "42"},
    ]
    prompt = await prompt_of(stack, {"input": items, "instructions": "Obey."})
    roles = [turn.partition("\n") for turn in prompt.split("<|im_start|>")[1:]]
    assert [(role, text.removesuffix("<|im_end|>\n")) for role, _, text in roles] == [
        ("system", "Obey."),
        ("system", "be brief"),
        ("user", "hi"),
        ("assistant", "hello"),
        ("tool", "42"),
        ("assistant", ""),
    ]


async def test_the_openai_client_creates_continues_retrieves_and_deletes(
    client: AsyncOpenAI, stack: RouterStack
) -> None:
    first = await client.responses.create(model=MODEL, input="one", max_output_tokens=9)
    assert first.output_text == "user\none"
    again = await client.responses.retrieve(first.id)
    assert again == first
    body = {"input": "two", "previous_response_id": first.id, "instructions": "new"}
    prompt = await prompt_of(stack, body)
    assert prompt == (
        "<|im_start|>system\nnew<|im_end|>\n<|im_start|>user\none<|im_end|>\n"
        "<|im_start|>assistant\nuser\none<|im_end|>\n<|im_start|>user\ntwo<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    await client.responses.delete(first.id)
    with pytest.raises(openai.NotFoundError):
        await client.responses.retrieve(first.id)
    with pytest.raises(openai.NotFoundError):
        await client.responses.delete(first.id)
    with pytest.raises(openai.BadRequestError) as gone:
        await client.responses.create(model=MODEL, input="x", previous_response_id=first.id)
    assert gone.value.code == "previous_response_not_found"
    assert gone.value.param == "previous_response_id"


async def test_a_stream_tells_how_its_items_grow(stack: RouterStack) -> None:
    events = await events_of(stack, says("héllo"))
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    kinds = [event["type"] for event in events]
    deltas = [event["delta"] for event in events if event["type"].endswith("text.delta")]
    assert "".join(deltas) == "user\nhéllo"
    assert [kind for kind in kinds if not kind.endswith(".delta")] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    added, done = events[2], events[-2]
    assert (added["item"]["content"], added["item"]["status"]) == ([], "in_progress")
    assert events[3]["part"]["text"] == ""
    assert added["item"]["id"] == done["item"]["id"] == events[4]["item_id"]
    assert events[-1]["response"]["output"] == [done["item"]]
    assert events[0]["response"]["id"] == events[-1]["response"]["id"]
    kept = await stack.client.get(f"{RESPONSES}/{events[0]['response']['id']}")
    assert kept.json() == events[-1]["response"]


async def test_calls_and_thoughts_are_items_of_their_own(stack: RouterStack) -> None:
    body = says(f"{CALL}\n{CALL}", tools=[WEATHER])
    answer = await ask(stack, body)
    kinds = [item["type"] for item in answer["output"]]
    assert kinds == ["message", "function_call", "function_call"]
    call = answer["output"][1]
    assert (call["name"], json.loads(call["arguments"])) == ("get_weather", {"city": "Köln"})
    assert call["call_id"] != answer["output"][2]["call_id"]
    assert answer["status"] == "completed"
    events = await events_of(stack, body)
    final = events[-1]["response"]["output"]
    assert [_without_ids(item) for item in final] == [_without_ids(i) for i in answer["output"]]
    arguments = [e for e in events if e["type"] == "response.function_call_arguments.done"]
    assert [e["output_index"] for e in arguments] == [1, 2]


async def test_one_call_at_most(stack: RouterStack) -> None:
    body = says(f"{CALL}\n{CALL} Done.", tools=[WEATHER], parallel_tool_calls=False)
    for answer in (await ask(stack, body), (await events_of(stack, body))[-1]["response"]):
        assert [item["type"] for item in answer["output"]] == ["message", "function_call"]
        assert (answer["status"], answer["parallel_tool_calls"]) == ("completed", False)


def _without_ids(item: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in item.items() if name not in ("id", "call_id")}


async def test_words_behind_a_call_are_an_item_of_their_own(stack: RouterStack) -> None:
    body = says(f"{CALL} Done.", tools=[WEATHER])
    for answer in (await ask(stack, body), (await events_of(stack, body))[-1]["response"]):
        kinds = [item["type"] for item in answer["output"]]
        assert kinds == ["message", "function_call", "message"]
        assert answer["output"][2]["content"][0]["text"] == " Done."


async def test_the_openai_client_follows_a_stream(client: AsyncOpenAI) -> None:
    body = says(f"Let me see. {CALL}", tools=[WEATHER])
    extra = {"stop": body.pop("stop")}
    async with client.responses.stream(**body, extra_body=extra) as stream:
        kinds = [event.type async for event in stream]
        final = await stream.get_final_response()
    assert kinds[-1] == "response.completed"
    message, call = final.output
    assert message.type == "message"
    assert final.output_text.endswith("Let me see. ")
    assert call.type == "function_call"
    assert json.loads(call.arguments) == {"city": "Köln"}


@pytest.mark.parametrize("choice", ["required", {"type": "function", "name": "get_weather"}])
async def test_a_forced_call_is_held_to_its_schema(stack: RouterStack, choice: Any) -> None:
    stack.workers[0].requests.clear()
    body = {"input": "x", "tools": [WEATHER], "tool_choice": choice, "max_output_tokens": 4}
    answer = await ask(stack, body)
    [request] = stack.workers[0].requests
    assert request.sampling.structured_outputs is not None
    assert answer["tool_choice"] == choice | {} if isinstance(choice, dict) else choice


async def test_the_openai_client_allows_some_tools(client: AsyncOpenAI) -> None:
    other = {"type": "function", "name": "get_time", "parameters": None, "strict": None}
    for mode, name in (("auto", "get_weather"), ("auto", "get_time"), ("required", "get_time")):
        tools = [{"type": "function", "name": name}]
        answer = await client.responses.create(
            model=MODEL,
            input=f"{CALL}END",
            tools=[WEATHER, other],
            tool_choice={"type": "allowed_tools", "mode": mode, "tools": tools},
            max_output_tokens=300,
            extra_body={"stop": "END"},
        )
        assert answer.tool_choice.to_dict() == {
            "type": "allowed_tools",
            "mode": mode,
            "tools": tools,
        }
        calls = [item.name for item in answer.output if item.type == "function_call"]
        if mode == "auto":
            assert calls == (["get_weather"] if name == "get_weather" else [])


async def test_text_formats_hold_the_output(stack: RouterStack) -> None:
    stack.workers[0].requests.clear()
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    formats = [
        {"type": "text"},
        {"type": "json_object"},
        {"type": "json_schema", "name": "a", "schema": schema, "strict": True},
    ]
    for wanted in formats:
        body = {"input": "x", "max_output_tokens": 2, "text": {"format": wanted}}
        assert (await ask(stack, body))["text"]["format"] == wanted
    free, anything, held = [r.sampling.structured_outputs for r in stack.workers[0].requests]
    assert free is None
    assert anything is not None
    assert anything.json_object
    assert held is not None
    assert held.json == schema


async def test_sampling_fields_mean_what_they_mean_in_a_chat(stack: RouterStack) -> None:
    stack.workers[0].requests.clear()
    fields = {"temperature": 0.5, "top_p": 0.25, "top_k": 7, "min_p": 0.125, "seed": 3}
    body = {"input": "x", "max_output_tokens": 2, "priority": -4, "cache_salt": "s", **fields}
    answer = await ask(stack, body)
    [request] = stack.workers[0].requests
    assert {name: getattr(request.sampling, name) for name in fields} == fields
    assert (request.priority, request.cache_salt) == (-4, "s")
    assert (answer["temperature"], answer["top_p"]) == (0.5, 0.25)


async def test_logprobs_come_with_the_text(stack: RouterStack) -> None:
    include = {"include": ["message.output_text.logprobs"], "top_logprobs": 1}
    body = {"input": "abc", "max_output_tokens": 6, **include}
    [item] = (await ask(stack, body))["output"]
    logprobs = item["content"][0]["logprobs"]
    assert len(logprobs) == 6
    assert set(logprobs[0]) == {"token", "logprob", "bytes", "top_logprobs"}
    events = await events_of(stack, body)
    deltas = [event for event in events if event["type"] == "response.output_text.delta"]
    assert [entry for delta in deltas for entry in delta["logprobs"]] == logprobs
    [done] = [e for e in events if e["type"] == "response.output_text.done"]
    assert done["logprobs"] == logprobs


async def test_truncation_leaves_out_the_oldest_turns(stack: RouterStack) -> None:
    turns = [{"role": "user", "content": f"turn {i} " + "x" * 80} for i in range(9)]
    body = {"input": [{"role": "system", "content": "stays"}, *turns], "max_output_tokens": 9}
    refused = await stack.post(RESPONSES, body)
    assert refused.json()["error"]["code"] == "context_length_exceeded"
    assert refused.json()["error"]["param"] == "input"
    prompt = await prompt_of(stack, body | {"truncation": "auto"})
    assert prompt.startswith("<|im_start|>system\nstays")
    assert "turn 8" in prompt
    assert "turn 0" not in prompt
    hopeless = [{"role": "user", "content": "x" * MAX_MODEL_LEN}] * 2
    refused = await stack.post(RESPONSES, {"input": hopeless, "truncation": "auto"})
    assert refused.json()["error"]["code"] == "context_length_exceeded"


async def test_thoughts_are_an_item(tmp_path_factory: pytest.TempPathFactory) -> None:
    settings = {"reasoning_parser": "deepseek_r1"}
    async with open_router_stack(tmp_path_factory.mktemp("router"), **settings) as stack:
        await stack.add_worker()
        body = says("hm, hm</think>\n\nYes.")
        answer = await ask(stack, body)
        thoughts, words = answer["output"]
        assert thoughts["type"] == "reasoning"
        assert thoughts["content"] == [{"type": "reasoning_text", "text": "user\nhm, hm"}]
        assert words["content"][0]["text"] == "\n\nYes."
        assert answer["usage"]["output_tokens_details"]["reasoning_tokens"] == 11
        events = await events_of(stack, body)
        kinds = [event["type"] for event in events if not event["type"].endswith(".delta")]
        assert kinds[2:7] == [
            "response.output_item.added",
            "response.content_part.added",
            "response.reasoning_text.done",
            "response.content_part.done",
            "response.output_item.done",
        ]
        final = events[-1]["response"]["output"]
        assert [_without_ids(item) for item in final] == [_without_ids(i) for i in answer["output"]]


async def test_a_call_that_was_cut_off_is_no_part_of_the_conversation(stack: RouterStack) -> None:
    choice = {"type": "function", "name": "get_weather"}
    body = {"input": "x", "tools": [WEATHER], "tool_choice": choice, "max_output_tokens": 4}
    answer = await ask(stack, body)
    assert answer["output"][0]["status"] == "incomplete"
    prompt = await prompt_of(stack, {"input": "y", "previous_response_id": answer["id"]})
    assert prompt.count("<|im_start|>assistant") == 1
