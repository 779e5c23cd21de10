"""LangChain's OpenAI package against a running stack."""

from typing import Any

import openai
import pytest
from client_requests import KEY, QUESTION, Weather
from langchain_openai import ChatOpenAI, OpenAI
from tandem_stack import MODEL


@pytest.fixture
def options(api_url: str) -> dict[str, Any]:
    return {
        "model": MODEL,
        "base_url": api_url,
        "api_key": KEY,
        "max_tokens": 60,
        "temperature": 0.0,
        "max_retries": 0,
    }


def test_a_chat(options: dict[str, Any]) -> None:
    answer = ChatOpenAI(**options).invoke(QUESTION)
    assert "Paris" in answer.content
    assert answer.response_metadata["finish_reason"] in ("stop", "length")
    assert answer.usage_metadata is not None
    assert answer.usage_metadata["output_tokens"] > 0


async def test_streams_say_the_same(options: dict[str, Any]) -> None:
    chat = ChatOpenAI(**options)
    whole = chat.invoke(QUESTION).content
    assert "".join(chunk.content for chunk in chat.stream(QUESTION)) == whole
    assert "".join([chunk.content async for chunk in chat.astream(QUESTION)]) == whole


def test_a_completion(options: dict[str, Any]) -> None:
    assert OpenAI(**options).invoke("The capital of France is")


@pytest.mark.parametrize("tool_choice", ["Weather", "any"])
def test_a_tool_is_called(options: dict[str, Any], tool_choice: str) -> None:
    answer = ChatOpenAI(**options).bind_tools([Weather], tool_choice=tool_choice).invoke(QUESTION)
    [call] = answer.tool_calls
    assert call["name"] == "Weather"
    Weather.model_validate(call["args"])


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_structured_output(options: dict[str, Any], method: str) -> None:
    answer = ChatOpenAI(**options).with_structured_output(Weather, method=method).invoke(QUESTION)
    assert isinstance(answer, Weather)


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({"model": "gpt-9"}, openai.NotFoundError),
        ({"api_key": "wrong"}, openai.AuthenticationError),
        ({"temperature": 1000.0}, openai.BadRequestError),
    ],
    ids=["model", "key", "temperature"],
)
def test_errors_have_their_kinds(
    options: dict[str, Any], changes: dict[str, Any], kind: type[openai.APIStatusError]
) -> None:
    with pytest.raises(kind) as caught:
        ChatOpenAI(**options | changes).invoke(QUESTION)
    assert caught.value.code
