"""Fields that vLLM's clients send: each does what it does there, or is refused by its name."""

from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio
from router_stack import RouterStack, open_router_stack

pytestmark = pytest.mark.asyncio(loop_scope="module")

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
USER = {"role": "user", "content": "hi"}
TEMPLATE = (
    "{% for message in messages %}{{ message.role[0] }}:{{ message.content }}"
    "{{ '(' + message.reasoning_content + ')' if message.reasoning_content }};{% endfor %}"
)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def stack(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[RouterStack]:
    async with open_router_stack(
        tmp_path_factory.mktemp("router"),
        reasoning_parser="deepseek_r1",
        trust_request_chat_template=True,
    ) as stack:
        await stack.add_worker()
        yield stack


async def prompt_of(stack: RouterStack, path: str, **body: Any) -> str:
    """The prompt as the worker gets it."""
    worker = stack.workers[0]
    worker.requests.clear()
    answer = await stack.post(path, {"max_tokens": 1} | body)
    assert answer.status_code == 200, answer.text
    request = worker.requests[0]
    token_ids = request.token_ids[: request.num_prompt_tokens]
    return stack.model.tokenizer.decode(token_ids, skip_special_tokens=False)


@pytest.mark.parametrize(
    ("fields", "kept"),
    [
        ({"truncate_prompt_tokens": 3}, "efg"),
        ({"truncate_prompt_tokens": 3, "truncation_side": "left"}, "efg"),
        ({"truncate_prompt_tokens": 3, "truncation_side": "right"}, "abc"),
        ({"truncate_prompt_tokens": -1}, "abcdefg"),
        ({"truncation_side": "right"}, "abcdefg"),
    ],
)
async def test_a_prompt_is_cut_on_the_side_that_is_asked_for(
    stack: RouterStack, fields: dict[str, Any], kept: str
) -> None:
    assert await prompt_of(stack, COMPLETIONS, prompt="abcdefg", **fields) == kept
    messages = [{"role": "user", "content": "abcdefg"}]
    template = "{{ messages[0].content }}"
    body = {"messages": messages, "chat_template": template, **fields}
    assert await prompt_of(stack, CHAT, **body) == kept


async def test_texts_that_are_only_read_are_cut_on_their_left(stack: RouterStack) -> None:
    body = {"input": "abc", "truncate_prompt_tokens": 2, "truncation_side": "left"}
    assert await prompt_of(stack, "/v1/embeddings", **body) == "bc"
    answer = await stack.post("/v1/embeddings", body | {"truncation_side": "right"})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "truncation_side"


async def test_messages_may_have_refusals_and_thoughts_under_either_name(
    stack: RouterStack,
) -> None:
    messages = [
        USER,
        {"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]},
        {"role": "assistant", "content": "a", "reasoning": "new"},
        {"role": "assistant", "content": "b", "reasoning_content": "old"},
    ]
    said = await prompt_of(stack, CHAT, messages=messages, chat_template=TEMPLATE)
    assert said == "u:hi;a:no;a:a(new);a:b(old);"
    messages[1] = {"role": "assistant", "content": [{"type": "refusal", "text": "no"}]}
    answer = await stack.post(CHAT, {"messages": messages})
    assert answer.json()["error"]["param"] == "messages[1].content[0].refusal"


@pytest.mark.parametrize(
    ("fields", "prompt"),
    [
        ({}, "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"),
        ({"add_generation_prompt": False}, "<|im_start|>user\nhi<|im_end|>\n"),
        ({"continue_final_message": True}, "<|im_start|>user\nhi"),
        (
            {"messages": [{"role": "developer", "content": [{"type": "text", "text": "be"}]}]},
            "<|im_start|>system\nbe<|im_end|>\n<|im_start|>assistant\n",
        ),
        (
            {"documents": [{"text": "a"}], "chat_template": "{{ documents[0].text }}"},
            "a",
        ),
    ],
)
async def test_a_chat_says_how_it_becomes_a_prompt(
    stack: RouterStack, fields: dict[str, Any], prompt: str
) -> None:
    assert await prompt_of(stack, CHAT, **({"messages": [USER]} | fields)) == prompt


@pytest.mark.parametrize(
    ("fields", "thinks"),
    [
        ({}, ""),
        ({"reasoning_effort": "none"}, "False"),
        ({"reasoning_effort": "low"}, "True"),
        (
            {"reasoning_effort": "low", "chat_template_kwargs": {"enable_thinking": False}},
            "False",
        ),
    ],
)
async def test_an_effort_says_whether_to_think_at_all(
    stack: RouterStack, fields: dict[str, Any], thinks: str
) -> None:
    template = "{{ messages[0].content }}{{ enable_thinking }}"
    body = {"messages": [USER], "chat_template": template, **fields}
    assert await prompt_of(stack, CHAT, **body) == f"hi{thinks}"


async def test_a_continued_message_is_repeated_for_who_asks(stack: RouterStack) -> None:
    messages = [USER, {"role": "assistant", "content": "well, "}]
    body = {"messages": messages, "max_tokens": 3, "continue_final_message": True}
    template = {"chat_template": "</think>{{ messages[0].content }}/{{ messages[1].content }}"}
    assert await prompt_of(stack, CHAT, **body, **template) == "</think>hi/well, "
    body |= {"max_tokens": 11, **template}  # the worker says what it's told: the end of thoughts
    plain = (await stack.post(CHAT, body)).json()["choices"][0]["message"]["content"]
    echoed = (await stack.post(CHAT, body | {"echo": True})).json()["choices"][0]["message"]
    assert echoed["content"] == f"well, {plain}"
    deltas = await _deltas(stack, body | {"echo": True})
    assert "".join(delta.get("content", "") for delta in deltas) == f"well, {plain}"
    other = body | {"echo": True, "messages": [messages[1], USER]}
    answer = (await stack.post(CHAT, other)).json()["choices"][0]["message"]
    assert not answer["content"].startswith("hi")


async def test_thoughts_are_left_out_for_who_asks(stack: RouterStack) -> None:
    body = {
        "messages": [{"role": "user", "content": "hm</think>yes"}],
        "chat_template": "{{ messages[0].content }}",
        "max_tokens": 13,
        "include_reasoning": False,
    }
    message = (await stack.post(CHAT, body)).json()["choices"][0]["message"]
    assert message["content"] == "yes"
    assert "reasoning_content" not in message
    deltas = await _deltas(stack, body)
    assert "".join(delta.get("content", "") for delta in deltas) == "yes"
    assert not any("reasoning_content" in delta for delta in deltas)


async def _deltas(stack: RouterStack, body: dict[str, Any]) -> list[dict[str, Any]]:
    return [event["choices"][0]["delta"] for event in await stack.stream(CHAT, body)]


@pytest.mark.parametrize("stream_options", [{}, {"continuous_usage_stats": True}])
async def test_a_chats_tokens_are_answered_for_who_asks(
    stack: RouterStack, stream_options: dict[str, bool]
) -> None:
    body = {"messages": [USER], "max_tokens": 3, "return_token_ids": True, "n": 2}
    whole = (await stack.post(CHAT, body)).json()
    prompt = (await stack.post("/tokenize", {"messages": [USER]})).json()["tokens"]
    assert whole["prompt_token_ids"] == prompt
    outputs = [choice["token_ids"] for choice in whole["choices"]]
    assert [len(token_ids) for token_ids in outputs] == [3, 3]
    events = await stack.stream(CHAT, body | {"stream_options": stream_options})
    firsts = [event for event in events if "prompt_token_ids" in event]
    assert [event["prompt_token_ids"] for event in firsts] == [prompt, prompt]
    assert all(event["choices"][0]["delta"]["role"] for event in firsts)
    streamed: list[list[int]] = [[], []]
    for event in events:
        (choice,) = event["choices"]
        streamed[choice["index"]] += choice.get("token_ids", [])
    assert streamed == outputs


async def test_tools_count_as_part_of_a_prompt(stack: RouterStack) -> None:
    tools = [{"type": "function", "function": {"name": "now"}}]
    template = "x{{ tools[0].function.name if tools }}"
    body = {"messages": [USER], "chat_template": template}
    assert (await stack.post("/tokenize", body)).json()["count"] == 1
    counted = (await stack.post("/tokenize", body | {"tools": tools})).json()
    assert counted["count"] == len("xnow")
    twice = await stack.post("/tokenize", body | {"tools": tools * 2})
    assert twice.json()["error"]["param"] == "tools[1].function.name"


async def test_no_alternatives_need_no_logprobs(stack: RouterStack) -> None:
    body = {"messages": [USER], "max_tokens": 1}
    assert (await stack.post(CHAT, body | {"top_logprobs": 0})).status_code == 200
    answer = await stack.post(CHAT, body | {"top_logprobs": 1})
    assert answer.json()["error"]["param"] == "logprobs"


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"suffix": " end"}, "suffix"),
    ({"logprob_token_ids": [1]}, "logprob_token_ids"),
    ({"repetition_detection": {"max_pattern_size": 3}}, "repetition_detection"),
    ({"watermarking": True}, "watermarking"),
    ({"return_prompt_text": True}, "return_prompt_text"),
    ({"vllm_xargs": {"a": 1}}, "vllm_xargs"),
    ({"ec_transfer_params": {}}, "ec_transfer_params"),
    ({"media_io_kwargs": {"image": {}}}, "media_io_kwargs"),
    ({"guided_json": {}, "guided_whitespace_pattern": " "}, "guided_whitespace_pattern"),
    (
        {"structured_outputs": {"json": {}, "whitespace_pattern": " "}},
        "structured_outputs.whitespace_pattern",
    ),
    (
        {"structured_outputs": {"json": {}, "disable_additional_properties": True}},
        "structured_outputs.disable_additional_properties",
    ),
    ({"truncation_side": "middle"}, "truncation_side"),
]


@pytest.mark.parametrize(("fields", "param"), REFUSED, ids=[param for _, param in REFUSED])
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
async def test_what_would_change_an_output_is_refused(
    stack: RouterStack, path: str, fields: dict[str, Any], param: str
) -> None:
    body = {"messages": [USER]} if path == CHAT else {"prompt": "hi"}
    answer = await stack.post(path, body | fields)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param


HARMLESS: list[dict[str, Any]] = [
    {"suffix": "", "length_penalty": 1},
    {"logprob_token_ids": []},
    {"watermarking": False, "return_prompt_text": False, "vllm_xargs": {}},
    {"structured_outputs": {"choice": ["a"], "disable_additional_properties": False}},
    {"user": "me", "metadata": {"a": "b"}, "request_id": "mine", "session_id": "s"},
    {"spaces_between_special_tokens": False, "stream_interval": 4},
]


@pytest.mark.parametrize("fields", HARMLESS, ids=str)
async def test_what_changes_nothing_is_taken(stack: RouterStack, fields: dict[str, Any]) -> None:
    answer = await stack.post(COMPLETIONS, {"prompt": "hi", "max_tokens": 1} | fields)
    assert answer.status_code == 200, answer.text


@pytest.mark.parametrize(
    ("one", "other"),
    [("text_1", "text_2"), ("queries", "documents"), ("queries", "items"), ("data_1", "data_2")],
)
async def test_scores_go_by_any_of_their_names(stack: RouterStack, one: str, other: str) -> None:
    answer = await stack.post("/score", {one: "a", other: ["b", "cc"]})
    assert answer.status_code == 200, answer.text
    named_first = await stack.post("/score", {"text_1": "a", "text_2": ["b", "cc"]})
    assert answer.json()["data"] == named_first.json()["data"]
    alone = await stack.post("/score", {one: "a"})
    assert alone.status_code == 400
    wrong = await stack.post("/score", {one: ["a", "b", "c"], other: ["b", "cc"]})
    assert wrong.json()["error"]["param"] == one


async def test_all_documents_are_ranked_where_none_is_too_many(stack: RouterStack) -> None:
    body = {"query": "q", "documents": ["a", "b"], "top_n": 0}
    assert len((await stack.post("/rerank", body)).json()["results"]) == 2
    assert (await stack.post("/rerank", body | {"top_n": -1})).status_code == 400
