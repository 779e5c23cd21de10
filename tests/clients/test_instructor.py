"""Instructor, which is all about structured output, against a running stack."""

from typing import Any

import instructor
import openai
import pytest
from client_requests import KEY, QUESTION, Weather
from tandem_stack import MODEL

OPTIONS: dict[str, Any] = {"model": MODEL, "max_tokens": 60, "temperature": 0.0, "max_retries": 0}


@pytest.fixture
def client(api_url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=api_url, api_key=KEY, max_retries=0)


@pytest.mark.parametrize("mode", [instructor.Mode.TOOLS, instructor.Mode.JSON_SCHEMA], ids=str)
def test_an_object(client: openai.OpenAI, mode: instructor.Mode) -> None:
    asking = instructor.from_openai(client, mode=mode)
    answer = asking.chat.completions.create(response_model=Weather, messages=QUESTION, **OPTIONS)
    assert isinstance(answer, Weather)


@pytest.mark.parametrize("mode", [instructor.Mode.TOOLS, instructor.Mode.JSON_SCHEMA], ids=str)
def test_an_object_in_pieces(client: openai.OpenAI, mode: instructor.Mode) -> None:
    asking = instructor.from_openai(client, mode=mode)
    pieces = list(
        asking.chat.completions.create_partial(response_model=Weather, messages=QUESTION, **OPTIONS)
    )
    assert len(pieces) > 1
    Weather.model_validate(pieces[-1].model_dump())


def test_text_goes_through(client: openai.OpenAI) -> None:
    answer = instructor.from_openai(client).chat.completions.create(
        response_model=None, messages=QUESTION, **OPTIONS
    )
    assert "Paris" in answer.choices[0].message.content


def test_an_error_reaches_the_caller(client: openai.OpenAI) -> None:
    asking = instructor.from_openai(client)
    with pytest.raises(Exception, match="gpt-9"):
        asking.chat.completions.create(
            response_model=Weather, messages=QUESTION, **OPTIONS | {"model": "gpt-9"}
        )
