"""Chat templates that a request brings along."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from router_stack import RouterStack, open_router_stack

CHAT, TOKENIZE = "/v1/chat/completions", "/tokenize"
TEMPLATE = "{% for message in messages %}[{{ message.content }}]{% endfor %}{{ mood }}"
BODY = {
    "messages": [{"role": "user", "content": "hi"}],
    "chat_template": TEMPLATE,
    "chat_template_kwargs": {"mood": "!"},
}


@pytest.fixture
async def stack(tmp_path: Path) -> AsyncIterator[RouterStack]:
    async with open_router_stack(tmp_path, trust_request_chat_template=True) as stack:
        await stack.add_worker()
        yield stack


async def test_its_own_template_makes_the_prompt(stack: RouterStack) -> None:
    answer = (await stack.post(CHAT, BODY | {"max_tokens": 5})).json()
    # The worker repeats the prompt.
    assert answer["choices"][0]["message"]["content"] == "[hi]!"
    assert (await stack.post(TOKENIZE, BODY)).json()["count"] == 5
    plain = {"messages": BODY["messages"]}
    assert (await stack.post(TOKENIZE, plain)).json()["count"] != 5


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{% for %}", "can't be parsed"),
        ("{{ raise_exception('no') }}", "refuses these messages: no"),
        ("{{ messages.__class__.__mro__ }}", "refuses these messages"),
        ("{{ messages.append(1) }}", "refuses these messages"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "refuses these messages"),
        ("{{ 'a'.encode('nothing') }}", "refuses these messages"),
        ("{{ " + "(" * 20_000 + " }}", "can't be parsed"),
        ("{{ " + "-" * 20_000 + "1 }}", "can't be parsed"),
        ("{% if 1 %}" * 200 + "{% endif %}" * 200, "can't be parsed"),
        ("{{ " + "9" * 5_000 + " }}", "can't be parsed"),
        ("x" * 70_000, "at most 65536 characters"),
        ("", "at least one token"),
    ],
)
async def test_bad_templates(stack: RouterStack, template: str, words: str) -> None:
    response = await stack.post(CHAT, BODY | {"chat_template": template})
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert words in error["message"]
    assert error["param"] == ("chat_template" if template else "messages")


async def test_nobody_brings_one_unless_that_is_allowed(tmp_path: Path) -> None:
    async with open_router_stack(tmp_path) as stack:
        await stack.add_worker()
        for path in (CHAT, TOKENIZE):
            response = await stack.post(path, BODY)
            error: dict[str, Any] = response.json()["error"]
            assert (response.status_code, error["param"]) == (400, "chat_template")
            assert "--trust-request-chat-template" in error["message"]
