"""Every bad request gets the right status and names the field; none gets a 500."""

import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
import pytest_asyncio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from router_stack import MAX_MODEL_LEN, RouterStack, open_router_stack

from protocol.errors import InvalidRequestError
from services.router.http.body import BodyReader
from services.router.messages.bodies import MessagesBody
from services.router.openai.bodies import ChatBody, CompletionBody
from services.router.responses.bodies import ResponsesBody

pytestmark = pytest.mark.asyncio(loop_scope="module")

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
USER = [{"role": "user", "content": "hi"}]
MAX_BODY_BYTES = 20_000


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def stack(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[RouterStack]:
    path = tmp_path_factory.mktemp("router")
    async with open_router_stack(path, max_body_bytes=MAX_BODY_BYTES) as stack:
        await stack.add_worker()
        yield stack


def assert_error(
    response: httpx.Response, status: int, param: str | None, code: str | None = None
) -> None:
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["param"] == param, error
    assert code is None or error["code"] == code, error
    assert error["message"]


BAD_SAMPLING: list[tuple[dict[str, Any], str]] = [
    ({"temperature": -0.1}, "temperature"),
    ({"temperature": "hot"}, "temperature"),
    ({"temperature": True}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"top_p": 1.1}, "top_p"),
    ({"top_k": -2}, "top_k"),
    ({"top_k": 1.5}, "top_k"),
    ({"min_p": 2}, "min_p"),
    ({"presence_penalty": 2.5}, "presence_penalty"),
    ({"frequency_penalty": -2.5}, "frequency_penalty"),
    ({"repetition_penalty": 0}, "repetition_penalty"),
    ({"n": 0}, "n"),
    ({"n": 129}, "n"),
    ({"seed": 2**64}, "seed"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": -1}, "max_tokens"),
    ({"max_tokens": 1.5}, "max_tokens"),
    ({"max_tokens": 10**30}, "max_tokens"),
    ({"min_tokens": 9, "max_tokens": 8}, "min_tokens"),
    ({"stop": ""}, "stop"),
    ({"stop": ["a", ""]}, "stop"),
    ({"stop": ["a"] * 65}, "stop"),
    ({"stop": "a" * 1025}, "stop"),
    ({"stop": [1]}, "stop[0]"),
    ({"stop": {}}, "stop"),
    ({"stop_token_ids": [-1]}, "stop_token_ids"),
    ({"stop_token_ids": [258]}, "stop_token_ids"),
    ({"stop_token_ids": ["a"]}, "stop_token_ids[0]"),
    ({"logit_bias": {"a": 1}}, "logit_bias"),
    ({"logit_bias": {"5": 101}}, "logit_bias"),
    ({"logit_bias": {"99999": 1}}, "logit_bias"),
    ({"logit_bias": [1]}, "logit_bias"),
    ({"stream": "yes"}, "stream"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"stream": True, "stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
    ({"priority": 2**40}, "priority"),
    ({"cache_salt": ""}, "cache_salt"),
    ({"cache_salt": 5}, "cache_salt"),
    ({"ignore_eos": "no"}, "ignore_eos"),
    ({"use_beam_search": True}, "use_beam_search"),
    ({"use_beam_search": 0}, "use_beam_search"),
    ({"bad_words": [""]}, "bad_words"),
    ({"bad_words": ["x" * 300]}, "bad_words"),
    ({"bad_words": ["x"] * 300}, "bad_words"),
    ({"bad_words": "x"}, "bad_words"),
    ({"allowed_token_ids": []}, "allowed_token_ids"),
    ({"allowed_token_ids": [-1]}, "allowed_token_ids"),
    ({"allowed_token_ids": [10**6]}, "allowed_token_ids"),
    ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
    ({"truncate_prompt_tokens": -2}, "truncate_prompt_tokens"),
    ({"truncate_prompt_tokens": 10**6}, "truncate_prompt_tokens"),
]


@pytest.mark.parametrize(("fields", "param"), BAD_SAMPLING, ids=[str(f) for f, _ in BAD_SAMPLING])
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
async def test_bad_sampling_fields(
    stack: RouterStack, path: str, fields: dict[str, Any], param: str
) -> None:
    body = {"messages": USER} if path == CHAT else {"prompt": "hi"}
    assert_error(await stack.post(path, body | fields), 400, param)


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
@pytest.mark.parametrize("field", ["temperature", "top_p", "repetition_penalty"])
async def test_numbers_that_are_none(stack: RouterStack, field: str, number: str) -> None:
    content = f'{{"prompt": "hi", "{field}": {number}}}'
    assert_error(await stack.client.post(COMPLETIONS, content=content), 400, field)


async def test_not_a_number_inside_of_a_field(stack: RouterStack) -> None:
    content = '{"prompt": "hi", "logit_bias": {"5": NaN}}'
    assert_error(await stack.client.post(COMPLETIONS, content=content), 400, "logit_bias.5")


async def test_not_a_number_under_half_a_surrogate_pair(stack: RouterStack) -> None:
    content = '{"prompt": "hi", "\\ud800": NaN}'
    assert_error(await stack.client.post(COMPLETIONS, content=content), 400, "?")


BAD_CHATS: list[tuple[dict[str, Any], str]] = [
    ({}, "messages"),
    ({"messages": []}, "messages"),
    ({"messages": None}, "messages"),
    ({"messages": "hi"}, "messages"),
    ({"messages": [{"content": "hi"}]}, "messages[0].role"),
    ({"messages": [{"role": "", "content": "hi"}]}, "messages[0].role"),
    ({"messages": [{"role": "user"}]}, "messages[0].content"),
    ({"messages": [*USER, {"role": "user", "content": 5}]}, "messages[1].content"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
        "messages[0].content[0].type",
    ),
    (
        {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
        "messages[0].content[0].text",
    ),
    ({"messages": [{"role": "forbidden", "content": "hi"}]}, "messages"),
    ({"messages": USER, "top_logprobs": 2}, "logprobs"),
    ({"messages": USER, "logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"messages": USER, "logprobs": 3}, "logprobs"),
    ({"messages": USER, "max_completion_tokens": 0}, "max_completion_tokens"),
    ({"messages": USER, "tools": [{"type": "function", "function": {"name": "f"}}]}, "tool_choice"),
    ({"messages": USER, "tool_choice": "required"}, "tool_choice"),
    *(
        (
            {
                "messages": USER,
                "tools": [{"function": {"name": "f", "parameters": {key: value}}}],
                "tool_choice": "required",
            },
            f"tools[0].function.parameters.{key}",
        )
        for key in ("$defs", "definitions")
        for value in (5, [], "x", None)
    ),
    ({"messages": USER, "functions": [{"name": "f"}]}, "functions"),
    ({"messages": USER, "modalities": ["audio"]}, "modalities"),
    ({"messages": USER, "chat_template": "{{ 1 }}"}, "chat_template"),
    ({"messages": USER, "chat_template_kwargs": 5}, "chat_template_kwargs"),
    (
        {"messages": USER, "continue_final_message": True, "add_generation_prompt": True},
        "continue_final_message",
    ),
    ({"messages": USER, "max_tokens": MAX_MODEL_LEN}, "messages"),
    ({"messages": USER, "min_tokens": MAX_MODEL_LEN}, "messages"),
]


@pytest.mark.parametrize(("body", "param"), BAD_CHATS, ids=[str(b)[:60] for b, _ in BAD_CHATS])
async def test_bad_chats(stack: RouterStack, body: dict[str, Any], param: str) -> None:
    assert_error(await stack.post(CHAT, body), 400, param)


BAD_PROMPTS: list[tuple[Any, str]] = [
    ("", "prompt"),
    ([], "prompt"),
    ([""], "prompt"),
    ([[]], "prompt"),
    ({}, "prompt"),
    (5, "prompt"),
    (["a", 1], "prompt"),
    ([1, [2]], "prompt"),
    ([1.5], "prompt[0]"),
    ([258], "prompt"),
    ([-1], "prompt"),
    ([[1], [10**30]], "prompt"),
    (["a"] * 2049, "prompt"),
]


@pytest.mark.parametrize(
    ("prompt", "param"), BAD_PROMPTS, ids=[str(p)[:40] for p, _ in BAD_PROMPTS]
)
async def test_bad_prompts(stack: RouterStack, prompt: Any, param: str) -> None:
    assert_error(await stack.post(COMPLETIONS, {"prompt": prompt}), 400, param)


@pytest.mark.parametrize("prompt", ["a" * MAX_MODEL_LEN, "a" * 15_000, [65] * 600])
async def test_a_prompt_that_is_too_long(stack: RouterStack, prompt: Any) -> None:
    response = await stack.post(COMPLETIONS, {"prompt": prompt})
    assert_error(response, 400, "prompt", "context_length_exceeded")
    assert str(MAX_MODEL_LEN) in response.json()["error"]["message"]


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (b"", "invalid_json"),
        (b"  ", "invalid_json"),
        (b"{", "invalid_json"),
        (b"hello", "invalid_json"),
        (b'{"prompt": "a"} x', "invalid_json"),
        (b'{"prompt": "\xff"}', "invalid_utf8"),
        (b'{"prompt": "\\ud800"}', "invalid_json"),
        (b"[]", "invalid_type"),
        (b"null", "invalid_type"),
        (b'{"prompt": "a", "x": ' + b"[" * 9000 + b"]" * 9000 + b"}", "invalid_json"),
        (b'{"prompt": "a", "tools": ' + b"[" * 9000 + b"]" * 9000 + b"}", "invalid_json"),
    ],
    ids=range(11),
)
async def test_bodies_that_are_no_objects(stack: RouterStack, content: bytes, code: str) -> None:
    assert_error(await stack.client.post(COMPLETIONS, content=content), 400, None, code)


async def test_a_missing_field_is_named(stack: RouterStack) -> None:
    assert_error(
        await stack.post(COMPLETIONS, {"n": 1}), 400, "prompt", "missing_required_parameter"
    )


async def test_an_unknown_model(stack: RouterStack) -> None:
    for path, body in ((CHAT, {"messages": USER}), (COMPLETIONS, {"prompt": "a"})):
        response = await stack.post(path, body | {"model": "gpt-9"})
        assert_error(response, 404, "model", "model_not_found")
    assert_error(await stack.client.get("/v1/models/gpt-9"), 404, "model", "model_not_found")


async def test_unknown_paths_and_methods(stack: RouterStack) -> None:
    assert_error(await stack.client.get("/v2/models"), 404, None, "not_found")
    response = await stack.client.get(CHAT)
    assert_error(response, 405, None, "method_not_allowed")
    assert response.headers["allow"] == "POST"


@pytest.mark.parametrize(
    ("path", "methods"),
    [("/ping", {"GET", "POST"}), ("/v1/responses/resp_1", {"GET", "DELETE"})],
)
async def test_a_refusal_names_all_methods_of_a_path(
    stack: RouterStack, path: str, methods: set[str]
) -> None:
    response = await stack.client.put(path)
    assert_error(response, 405, None, "method_not_allowed")
    assert set(response.headers["allow"].split(", ")) == methods


@pytest.mark.parametrize("path", ["/health/", f"{CHAT}/", "/tokenize/"])
async def test_nobody_is_sent_elsewhere_for_a_slash(stack: RouterStack, path: str) -> None:
    assert_error(await stack.post(path, {"messages": USER}), 404, None, "not_found")


async def test_a_page_that_may_not_ask_is_told_in_the_same_shape(stack: RouterStack) -> None:
    headers = {"Origin": "http://page.example", "Access-Control-Request-Method": "BREW"}
    response = await stack.client.options(CHAT, headers=headers)
    assert_error(response, 400, None, "cors_refused")
    assert response.headers["access-control-allow-origin"] == "*"


async def test_a_body_that_is_too_long(stack: RouterStack) -> None:
    body = json.dumps({"prompt": "a" * MAX_BODY_BYTES}).encode()
    assert_error(await stack.client.post(COMPLETIONS, content=body), 413, None, "request_too_large")

    async def chunks() -> AsyncIterator[bytes]:
        yield body[:-10]
        yield body[-10:]

    assert_error(
        await stack.client.post(COMPLETIONS, content=chunks()), 413, None, "request_too_large"
    )


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "prompt"),
        ({"prompt": "a", "messages": USER}, "prompt"),
        ({"messages": []}, "messages"),
        ({"prompt": 5}, "prompt"),
    ],
)
async def test_bad_tokenize_bodies(stack: RouterStack, body: Any, param: str) -> None:
    assert_error(await stack.post("/tokenize", body), 400, param)


@pytest.mark.parametrize("tokens", [[-1], [258], ["a"], "a", None])
async def test_bad_detokenize_bodies(stack: RouterStack, tokens: Any) -> None:
    response = await stack.post("/detokenize", {"tokens": tokens})
    assert response.status_code == 400
    assert response.json()["error"]["param"].startswith("tokens")


async def test_values_that_ask_for_nothing_special_are_accepted(stack: RouterStack) -> None:
    body = {
        "messages": USER,
        "max_tokens": 1,
        "tools": [{"type": "function", "function": {"name": "f"}}],
        "tool_choice": "none",
        "response_format": {"type": "text"},
        "best_of": 1,
        "logit_bias": None,
        "stop": None,
        "user": "me",
        "store": False,
        "some_new_field": {"a": [1]},
    }
    response = await stack.post(CHAT, body)
    assert response.status_code == 200, response.text


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=6,
)


def fields_of(body: type[ChatBody | CompletionBody]) -> st.SearchStrategy[dict[str, Any]]:
    names = st.sampled_from(body.__struct_fields__)
    return st.dictionaries(names, json_values, max_size=4)


@given(data=st.data())
@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
async def test_any_field_with_any_value_is_answered_or_refused(
    stack: RouterStack, data: st.DataObject
) -> None:
    path, kind, base = data.draw(
        st.sampled_from(
            [
                (CHAT, ChatBody, {"messages": USER, "max_tokens": 2}),
                (COMPLETIONS, CompletionBody, {"prompt": "hi", "max_tokens": 2}),
                ("/v1/responses", ResponsesBody, {"input": "hi", "max_output_tokens": 2}),
                ("/v1/messages", MessagesBody, {"messages": USER, "max_tokens": 2}),
            ]
        )
    )
    body = base | data.draw(fields_of(kind))
    body.pop("n", None)
    response = await stack.client.post(path, content=json.dumps(body))
    assert response.status_code in (200, 400, 404), (body, response.text)
    if response.status_code != 200:
        assert response.json()["error"]["message"]


@given(content=st.binary(max_size=60))
async def test_bytes_that_are_no_chat_are_refused(content: bytes) -> None:
    with pytest.raises(InvalidRequestError):
        BodyReader(ChatBody, max_bytes=1000).parse(content)
