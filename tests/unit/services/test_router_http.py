"""Answers of the API, whole and streamed, over real HTTP, ZMQ and Redis."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
import pytest_asyncio
from router_stack import MAX_MODEL_LEN, MODEL, RouterStack, open_router_stack, parse_events

pytestmark = pytest.mark.asyncio(loop_scope="module")

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def stack(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[RouterStack]:
    async with open_router_stack(tmp_path_factory.mktemp("router")) as stack:
        await stack.add_worker("prefill")
        await stack.add_worker("decode")
        yield stack


def chat(text: str, **fields: Any) -> dict[str, Any]:
    return {"model": MODEL, "messages": [{"role": "user", "content": text}], **fields}


def texts(events: list[dict[str, Any]], index: int = 0) -> list[str]:
    choices = [c for event in events for c in event["choices"] if c["index"] == index]
    return [c["text"] if "text" in c else c["delta"]["content"] for c in choices]


async def test_a_completion(stack: RouterStack) -> None:
    response = await stack.post(COMPLETIONS, {"prompt": "hello", "max_tokens": 7})
    body = response.json()
    assert body["object"] == "text_completion"
    assert body["model"] == MODEL
    assert response.headers["x-request-id"] == body["id"]
    [choice] = body["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("hellohe", "length")
    assert body["usage"] == {
        "prompt_tokens": 5,
        "completion_tokens": 7,
        "total_tokens": 12,
        "prompt_tokens_details": {"cached_tokens": 0},
    }


async def test_a_chat(stack: RouterStack) -> None:
    response = await stack.post(CHAT, chat("hi", max_completion_tokens=8))
    body = response.json()
    [choice] = body["choices"]
    # The no-op worker repeats the prompt, the template's special tokens included.
    assert choice["message"] == {"role": "assistant", "content": "user\nhi", "refusal": None}
    assert body["usage"]["prompt_tokens"] == len("user\nhi\nassistant\n") + 3


async def test_the_default_length_is_16_for_completions_and_the_rest_for_chats(
    stack: RouterStack,
) -> None:
    completion = (await stack.post(COMPLETIONS, {"prompt": "abc"})).json()
    assert completion["usage"]["completion_tokens"] == 16
    answer = (await stack.post(CHAT, chat("abc"))).json()
    assert answer["usage"]["total_tokens"] == MAX_MODEL_LEN


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
async def test_a_stream_holds_what_the_whole_answer_holds(stack: RouterStack, path: str) -> None:
    body = chat("héllo 日本 👩‍💻", max_tokens=60)
    if path == COMPLETIONS:
        body = {"prompt": "héllo 日本 👩‍💻", "max_tokens": 60}
    whole = (await stack.post(path, body)).json()
    events = await stack.stream(path, body | {"stream_options": {"include_usage": True}})
    [choice] = whole["choices"]
    text = choice["text"] if path == COMPLETIONS else choice["message"]["content"]
    assert "".join(texts(events)) == text
    assert not any("�" in part for part in texts(events)[:-1])
    assert [e["choices"][0]["finish_reason"] for e in events[:-1]][-1] == "length"
    assert events[-1]["choices"] == []
    assert events[-1]["usage"] == whole["usage"]
    assert all(event["usage"] is None for event in events[:-1])
    assert len({event["id"] for event in events}) == 1


async def test_a_chat_stream_opens_with_the_role(stack: RouterStack) -> None:
    events = await stack.stream(CHAT, chat("hi", max_tokens=4))
    assert events[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert "usage" not in events[0]


async def test_usage_with_every_event_on_request(stack: RouterStack) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    events = await stack.stream(COMPLETIONS, {"prompt": "hello", "stream_options": options})
    counts = [event["usage"]["completion_tokens"] for event in events]
    assert counts == sorted(counts)
    assert counts[-1] == 16


@pytest.mark.parametrize("stream", [False, True])
async def test_a_stop_string_across_tokens(stack: RouterStack, *, stream: bool) -> None:
    body = {"prompt": "one two three", "max_tokens": 100, "stop": ["two t", "zzz"]}
    if stream:
        events = await stack.stream(COMPLETIONS, body)
        text, choice = "".join(texts(events)), events[-1]["choices"][0]
    else:
        [choice] = (await stack.post(COMPLETIONS, body)).json()["choices"]
        text = choice["text"]
    assert (text, choice["finish_reason"], choice["stop_reason"]) == ("one ", "stop", "two t")
    decode = stack.workers[1]
    # Whoever stops a sequence by its text tells the workers.
    assert (await decode.aborted.get()).request_id.startswith("cmpl-")


async def test_the_stop_string_is_kept_on_request(stack: RouterStack) -> None:
    body = {
        "prompt": "one two",
        "max_tokens": 50,
        "stop": "two",
        "include_stop_str_in_output": True,
    }
    [choice] = (await stack.post(COMPLETIONS, body)).json()["choices"]
    assert choice["text"] == "one two"


async def test_several_outputs_of_several_prompts(stack: RouterStack) -> None:
    body = {"prompt": ["abc", "xyz"], "n": 2, "max_tokens": 4}
    answer = (await stack.post(COMPLETIONS, body)).json()
    assert [(c["index"], c["text"]) for c in answer["choices"]] == [
        (0, "abca"),
        (1, "abca"),
        (2, "xyzx"),
        (3, "xyzx"),
    ]
    assert answer["usage"]["prompt_tokens"] == 6
    assert answer["usage"]["completion_tokens"] == 16
    events = await stack.stream(COMPLETIONS, body)
    assert ["".join(texts(events, i)) for i in range(4)] == ["abca", "abca", "xyzx", "xyzx"]


async def test_each_of_n_outputs_has_its_own_seed(stack: RouterStack) -> None:
    decode = stack.workers[1]
    decode.requests.clear()
    await stack.post(CHAT, chat("hi", n=3, seed=7, max_tokens=2, temperature=0.5))
    assert sorted(request.sampling.seed or 0 for request in decode.requests) == [7, 8, 9]
    assert {request.sampling.n for request in decode.requests} == {1}


@pytest.mark.parametrize(
    "prompt", [[104, 105], [[104, 105]], ["hi"], "hi"], ids=["ids", "lists", "texts", "text"]
)
async def test_the_four_forms_of_a_prompt(stack: RouterStack, prompt: Any) -> None:
    token_ids = (await stack.post("/tokenize", {"prompt": "hi"})).json()["tokens"]
    if prompt == [104, 105]:
        prompt = token_ids
    elif prompt == [[104, 105]]:
        prompt = [token_ids]
    answer = (await stack.post(COMPLETIONS, {"prompt": prompt, "max_tokens": 4})).json()
    assert answer["choices"][0]["text"] == "hihi"


async def test_echo_puts_the_prompt_before_the_text(stack: RouterStack) -> None:
    body = {"prompt": "abc", "echo": True, "max_tokens": 2}
    assert (await stack.post(COMPLETIONS, body)).json()["choices"][0]["text"] == "abcab"
    assert "".join(texts(await stack.stream(COMPLETIONS, body))) == "abcab"


async def test_sampling_fields_reach_the_workers(stack: RouterStack) -> None:
    decode = stack.workers[1]
    decode.requests.clear()
    fields: dict[str, Any] = {
        "temperature": 0.3,
        "top_p": 0.9,
        "top_k": 5,
        "min_p": 0.1,
        "repetition_penalty": 1.1,
        "presence_penalty": 0.2,
        "frequency_penalty": 0.3,
        "min_tokens": 2,
        "max_tokens": 3,
        "ignore_eos": True,
    }
    extra: dict[str, Any] = {"stop_token_ids": [7], "logit_bias": {"5": -1}}
    more = {"cache_salt": "me", "priority": 4}
    await stack.post(CHAT, chat("hi", **fields, **extra, **more))
    [request] = decode.requests
    assert {name: getattr(request.sampling, name) for name in fields} == fields
    assert request.sampling.stop_token_ids == (7,)
    assert request.sampling.logit_bias == {5: -1.0}
    assert (request.cache_salt, request.priority) == ("me", 4)


@pytest.mark.parametrize("stream", [False, True])
async def test_chat_logprobs_have_the_tokens_bytes(stack: RouterStack, *, stream: bool) -> None:
    body = chat("é", logprobs=True, top_logprobs=1, max_tokens=9, skip_special_tokens=False)
    if stream:
        choices = [c for event in await stack.stream(CHAT, body) for c in event["choices"]]
        entries = [e for c in choices if c["logprobs"] for e in c["logprobs"]["content"]]
    else:
        [choice] = (await stack.post(CHAT, body)).json()["choices"]
        entries = choice["logprobs"]["content"]
    assert [entry["token"] for entry in entries][:6] == ["<|im_start|>", "u", "s", "e", "r", "\n"]
    first, second = entries[6:8]
    assert (first["bytes"], second["bytes"]) == ([0xC3], [0xA9])
    assert first["top_logprobs"] == [{"token": "�", "logprob": -0.5, "bytes": [0xC3]}]


@pytest.mark.parametrize("stream", [False, True])
async def test_completion_logprobs(stack: RouterStack, *, stream: bool) -> None:
    body = {"prompt": "abc", "logprobs": 1, "max_tokens": 3}
    if stream:
        events = await stack.stream(COMPLETIONS, body)
        parts = [c["logprobs"] for event in events for c in event["choices"] if c["logprobs"]]
        logprobs = {name: [v for part in parts for v in part[name]] for name in parts[0]}
    else:
        [choice] = (await stack.post(COMPLETIONS, body)).json()["choices"]
        logprobs = choice["logprobs"]
    assert logprobs == {
        "tokens": ["a", "b", "c"],
        "token_logprobs": [-0.5] * 3,
        "top_logprobs": [{"a": -0.5}, {"b": -0.5}, {"c": -0.5}],
        "text_offset": [0, 1, 2],
    }


async def test_token_ids_on_request(stack: RouterStack) -> None:
    body = {"prompt": "abc", "max_tokens": 2, "return_token_ids": True}
    [choice] = (await stack.post(COMPLETIONS, body)).json()["choices"]
    assert choice["token_ids"] == choice["prompt_token_ids"][:2]
    named = body | {"logprobs": 0, "return_tokens_as_token_ids": True}
    [choice] = (await stack.post(COMPLETIONS, named)).json()["choices"]
    assert choice["logprobs"]["tokens"] == [f"token_id:{i}" for i in choice["token_ids"]]


async def test_tokenize_and_detokenize_are_inverse(stack: RouterStack) -> None:
    answer = (await stack.post("/tokenize", {"prompt": "hé", "return_token_strs": True})).json()
    assert (answer["count"], answer["token_strs"]) == (3, ["h", "Ã", "©"])
    assert answer["max_model_len"] == MAX_MODEL_LEN
    text = (await stack.post("/detokenize", {"tokens": answer["tokens"]})).json()
    assert text == {"prompt": "hé"}


async def test_tokenize_applies_the_chat_template(stack: RouterStack) -> None:
    answer = (await stack.post("/tokenize", chat("hi"))).json()
    text = (await stack.post("/detokenize", {"tokens": answer["tokens"]})).json()["prompt"]
    assert text == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


async def test_models(stack: RouterStack) -> None:
    listed = (await stack.client.get("/v1/models")).json()["data"]
    assert [card["id"] for card in listed] == [MODEL, "alias"]
    assert listed[0]["max_model_len"] == MAX_MODEL_LEN
    assert (await stack.client.get("/v1/models/alias")).json() == listed[1]
    assert (await stack.post(CHAT, chat("hi") | {"model": "alias"})).json()["model"] == "alias"


@pytest.mark.parametrize("path", ["/health", "/ping", "/version", "/load", "/load_config"])
async def test_small_endpoints(stack: RouterStack, path: str) -> None:
    assert (await stack.client.get(path)).status_code == 200


async def test_load_config_keeps_secrets(stack: RouterStack) -> None:
    text = (await stack.client.get("/load_config")).text
    assert "api_key" not in text.replace("api_key_file", "")
    assert "redis" not in text


async def test_openapi_describes_the_bodies(stack: RouterStack) -> None:
    schema = (await stack.client.get("/openapi.json")).json()
    content = schema["paths"][CHAT]["post"]["requestBody"]["content"]["application/json"]
    assert content["schema"] == {"$ref": "#/components/schemas/ChatBody"}
    assert "messages" in schema["components"]["schemas"]["ChatBody"]["properties"]


async def test_metrics_count_requests_and_tokens(stack: RouterStack) -> None:
    async def value(name: str) -> float:
        text = (await stack.client.get("/metrics")).text
        lines = [line for line in text.splitlines() if line.startswith(name)]
        return sum(float(line.split()[-1]) for line in lines)

    before = await value("vllm:generation_tokens_total")
    await stack.post(COMPLETIONS, {"prompt": "abc", "max_tokens": 5})
    assert await value("vllm:generation_tokens_total") == before + 5
    assert await value("vllm:request_success_total") > 0
    assert await value("vllm:time_to_first_token_seconds_count") > 0
    assert await value("tandem:workers") == 2


async def test_other_origins_may_ask(stack: RouterStack) -> None:
    response = await stack.client.get("/v1/models", headers={"Origin": "http://page.example"})
    assert response.headers["access-control-allow-origin"] == "*"


async def test_500_streams_at_once(stack: RouterStack) -> None:
    limits = httpx.Limits(max_connections=500)
    async with httpx.AsyncClient(base_url=stack.url, timeout=60.0, limits=limits) as client:

        async def one(i: int) -> str:
            body = {"prompt": f"{i:03}", "max_tokens": 30, "stream": True}
            response = await client.post(COMPLETIONS, json=body)
            events = parse_events(response.content)
            return "".join(event["choices"][0]["text"] for event in events)

        texts = await asyncio.gather(*(one(i) for i in range(500)))
    assert texts == [f"{i:03}" * 10 for i in range(500)]
    assert stack.service.dispatcher.num_flights == 0
