"""How long outputs may think, as clients say it: what workers are told, and what is refused."""

from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio
from router_stack import RouterStack, open_router_stack

from protocol.sampling import ThoughtLimit

pytestmark = pytest.mark.asyncio(loop_scope="module")

MESSAGES = [{"role": "user", "content": "hi"}]
MARKS = ("<think>", "</think>")
OPENING, CLOSING = 258, 259
CHAT: dict[str, Any] = {"messages": MESSAGES, "max_tokens": 2}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def stack(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[RouterStack]:
    path = tmp_path_factory.mktemp("router")
    async with open_router_stack(path, marks=MARKS, reasoning_parser="qwen3") as stack:
        await stack.add_worker()
        yield stack


def limit(max_tokens: int, *, starts_inside: bool = False) -> ThoughtLimit:
    return ThoughtLimit(
        max_tokens=max_tokens,
        opening_token_id=OPENING,
        closing_token_id=CLOSING,
        starts_inside=starts_inside,
    )


def thinking(budget: int, kind: str = "enabled") -> dict[str, Any]:
    return {**CHAT, "thinking": {"type": kind, "budget_tokens": budget}}


RESPONSE = {"input": "hi", "max_output_tokens": 2, "thinking_token_budget": 6}
ASKED: list[tuple[str, dict[str, Any], ThoughtLimit | None]] = [
    ("chat/completions", CHAT, None),
    ("chat/completions", {**CHAT, "thinking_token_budget": 7}, limit(7)),
    ("chat/completions", {**CHAT, "thinking_token_budget": 0}, limit(0)),
    ("responses", RESPONSE, limit(6)),
    ("messages", thinking(1024), limit(1024)),
    ("messages", thinking(1024, "disabled"), None),
]


@pytest.mark.parametrize(("path", "body", "expected"), ASKED, ids=lambda value: str(value)[-40:])
async def test_workers_are_told_the_limit(
    stack: RouterStack, path: str, body: dict[str, Any], expected: ThoughtLimit | None
) -> None:
    stack.workers[0].requests.clear()
    answer = await stack.post(f"/v1/{path}", body)
    assert answer.status_code == 200, answer.text
    assert stack.workers[0].requests[0].sampling.thoughts == expected


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("chat/completions", {**CHAT, "thinking_token_budget": -1}, "thinking_token_budget"),
    ("chat/completions", {**CHAT, "thinking_token_budget": 2**31}, "thinking_token_budget"),
    ("chat/completions", {**CHAT, "thinking_token_budget": "a"}, "thinking_token_budget"),
    ("completions", {"prompt": "hi", "thinking_token_budget": 5}, "thinking_token_budget"),
    ("responses", {**RESPONSE, "thinking_token_budget": -1}, "thinking_token_budget"),
    ("messages", thinking(-1), "thinking.budget_tokens"),
]


@pytest.mark.parametrize(("path", "body", "field"), REFUSED, ids=lambda value: str(value)[-40:])
async def test_what_is_no_limit_is_a_400_that_names_the_field(
    stack: RouterStack, path: str, body: dict[str, Any], field: str
) -> None:
    answer = await stack.post(f"/v1/{path}", body)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert f"`{field}`" in error["message"]
    if path != "messages":
        assert error["param"] == field


@pytest.mark.parametrize(
    "options", [{"reasoning_parser": "qwen3"}, {"marks": MARKS}], ids=["no marks", "no parser"]
)
async def test_it_takes_a_parser_and_marks_that_are_tokens(
    tmp_path: Any, options: dict[str, Any]
) -> None:
    async with open_router_stack(tmp_path, **options) as plain:
        await plain.add_worker()
        answer = await plain.post("/v1/chat/completions", {**CHAT, "thinking_token_budget": 7})
        assert answer.status_code == 400, answer.text
        assert answer.json()["error"]["param"] == "thinking_token_budget"
        assert answer.json()["error"]["code"] == "unsupported_parameter"
        # Here a budget is what asks for thoughts at all.
        assert (await plain.post("/v1/messages", thinking(1024))).status_code == 200


async def test_a_model_may_begin_inside_its_thoughts(tmp_path: Any) -> None:
    async with open_router_stack(tmp_path, marks=MARKS, reasoning_parser="deepseek_r1") as inside:
        worker = await inside.add_worker()
        await inside.post("/v1/chat/completions", {**CHAT, "thinking_token_budget": 7})
        assert worker.requests[0].sampling.thoughts == limit(7, starts_inside=True)
