"""LiteLLM against a running stack."""

from typing import Any

import litellm
import pytest
from client_requests import KEY, QUESTION, WEATHER_TOOL, Weather
from tandem_stack import MODEL


@pytest.fixture
def options(api_url: str) -> dict[str, Any]:
    return {
        "model": f"openai/{MODEL}",
        "api_base": api_url,
        "api_key": KEY,
        "max_tokens": 24,
        "temperature": 0.0,
        "num_retries": 0,
    }


def test_a_chat(options: dict[str, Any]) -> None:
    answer = litellm.completion(messages=QUESTION, **options)
    assert "Paris" in answer.choices[0].message.content
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_a_stream_says_the_same(options: dict[str, Any]) -> None:
    whole = litellm.completion(messages=QUESTION, **options)
    asked = {"stream": True, "stream_options": {"include_usage": True}}
    chunks = list(litellm.completion(messages=QUESTION, **options, **asked))
    rebuilt = litellm.stream_chunk_builder(chunks, messages=QUESTION)
    assert rebuilt.choices[0].message.content == whole.choices[0].message.content
    assert rebuilt.usage.completion_tokens == whole.usage.completion_tokens


async def test_asynchronously(options: dict[str, Any]) -> None:
    stream = await litellm.acompletion(messages=QUESTION, stream=True, **options)
    text = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
    assert "Paris" in text


def test_a_completion(options: dict[str, Any]) -> None:
    options["model"] = f"text-completion-openai/{MODEL}"
    answer = litellm.text_completion(prompt="The capital of France is", **options)
    assert answer.choices[0].text


@pytest.mark.parametrize("stream", [False, True])
def test_a_tool_is_called(options: dict[str, Any], *, stream: bool) -> None:
    answer = litellm.completion(
        messages=QUESTION,
        tools=[WEATHER_TOOL],
        tool_choice={"type": "function", "function": {"name": "weather"}},
        stream=stream,
        **options | {"max_tokens": 60},
    )
    if stream:
        answer = litellm.stream_chunk_builder(list(answer), messages=QUESTION)
    [call] = answer.choices[0].message.tool_calls
    assert call.function.name == "weather"
    Weather.model_validate_json(call.function.arguments)


def test_structured_output(options: dict[str, Any]) -> None:
    options["max_tokens"] = 60
    answer = litellm.completion(messages=QUESTION, response_format=Weather, **options)
    Weather.model_validate_json(answer.choices[0].message.content)


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({"model": "openai/gpt-9"}, litellm.NotFoundError),
        ({"api_key": "wrong"}, litellm.AuthenticationError),
        ({"temperature": 1000.0}, litellm.BadRequestError),
        ({"max_tokens": 10**6}, litellm.ContextWindowExceededError),
    ],
    ids=["model", "key", "temperature", "length"],
)
def test_errors_have_their_kinds(
    options: dict[str, Any], changes: dict[str, Any], kind: type[Exception]
) -> None:
    with pytest.raises(kind):
        litellm.completion(messages=QUESTION, **options | changes)
