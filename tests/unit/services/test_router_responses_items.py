"""What a response was made from, as /v1/responses/{id}/input_items lists it."""

from collections.abc import AsyncIterator
from typing import Any

import openai
import pytest
import pytest_asyncio
from openai import AsyncOpenAI
from router_stack import MODEL, RouterStack, open_router_stack

pytestmark = pytest.mark.asyncio(loop_scope="module")

RESPONSES = "/v1/responses"
ITEMS: list[dict[str, Any]] = [
    {"role": "developer", "content": [{"type": "input_text", "text": "be brief"}]},
    {"role": "user", "content": "hi"},
    {"type": "reasoning", "id": "rs_1", "summary": [{"type": "summary_text", "text": "x"}]},
    {"type": "message", "id": "msg_1", "role": "assistant", "content": "hello"},
    {"type": "function_call", "id": "fc_1", "call_id": "c", "name": "f", "arguments": "{}"},
    {"type": "function_call_output", "call_id": "c", "output": "42"},
]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def stack(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[RouterStack]:
    async with open_router_stack(tmp_path_factory.mktemp("router")) as stack:
        await stack.add_worker()
        yield stack


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def client(stack: RouterStack) -> AsyncIterator[AsyncOpenAI]:
    async with AsyncOpenAI(base_url=f"{stack.url}/v1", api_key="none", max_retries=0) as client:
        yield client


async def ask(stack: RouterStack, given: Any, **fields: Any) -> str:
    response = await stack.post(RESPONSES, {"input": given, "max_output_tokens": 9, **fields})
    assert response.status_code == 200, response.text
    return response.json()["id"]


async def page(stack: RouterStack, response_id: str, query: str = "") -> dict[str, Any]:
    response = await stack.client.get(f"{RESPONSES}/{response_id}/input_items?{query}")
    assert response.status_code == 200, response.text
    return response.json()


async def test_all_kinds_of_items_are_listed(stack: RouterStack, client: AsyncOpenAI) -> None:
    response_id = await ask(stack, ITEMS)
    listed = (await page(stack, response_id, "order=asc"))["data"]
    assert len({item["id"] for item in listed}) == len(ITEMS)
    assert [item["id"] for item in listed[2:5]] == ["rs_1", "msg_1", "fc_1"]
    assert {item["status"] for item in listed} == {"completed"}
    bare = [{k: v for k, v in item.items() if k not in ("id", "status")} for item in listed]
    output_text = {"type": "output_text", "text": "hello", "annotations": []}
    assert bare == [
        {"type": "message", **ITEMS[0]},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "hi"}]},
        {"type": "reasoning", "summary": ITEMS[2]["summary"], "content": []},
        {"type": "message", "role": "assistant", "content": [output_text]},
        {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c", "output": "42"},
    ]
    # The client's own types take them, newest first unless asked otherwise.
    typed = [item async for item in client.responses.input_items.list(response_id)]
    assert [item.type for item in typed] == [item["type"] for item in listed[::-1]]


async def test_the_whole_conversation_is_listed(stack: RouterStack, client: AsyncOpenAI) -> None:
    first = await client.responses.create(model=MODEL, input="one", max_output_tokens=9)
    second_id = await ask(stack, "two", previous_response_id=first.id)
    items = (await page(stack, second_id, "order=asc"))["data"]
    assert [(item["role"], item["content"][0]["text"]) for item in items] == [
        ("user", "one"),
        ("assistant", "user\none"),
        ("user", "two"),
    ]
    assert items[1]["id"] == first.output[0].id
    assert items[0] == (await page(stack, first.id))["data"][0], "the same ids"


async def test_pages_follow_each_other(stack: RouterStack, client: AsyncOpenAI) -> None:
    given = [{"role": "user", "content": str(i)} for i in range(23)]
    response_id = await ask(stack, given)
    for order in ("asc", "desc"):
        items = client.responses.input_items.list(response_id, limit=5, order=order)
        texts = [item.content[0].text async for item in items]
        assert texts == [str(i) for i in (range(23) if order == "asc" else range(22, -1, -1))]
    default = await page(stack, response_id)
    assert (len(default["data"]), default["has_more"]) == (20, True)
    assert (default["first_id"], default["last_id"]) == tuple(
        default["data"][i]["id"] for i in (0, -1)
    )
    rest = await page(stack, response_id, f"after={default['last_id']}")
    assert (len(rest["data"]), rest["has_more"]) == (3, False)


async def test_items_that_come_twice_are_told_apart(stack: RouterStack) -> None:
    item = {"id": "msg_1", "role": "user", "content": "x"}
    items = (await page(stack, await ask(stack, [item, item]), "order=asc"))["data"]
    assert items[0]["id"] == "msg_1" != items[1]["id"]


@pytest.mark.parametrize(
    ("query", "field"),
    [
        ("limit=0", "limit"),
        ("limit=101", "limit"),
        ("limit=x", "limit"),
        (f"limit={'9' * 5000}", "limit"),
        ("order=up", "order"),
        ("after=msg_no", "after"),
        ("include=file_search_call.results", "include"),
        ("include[]=message.output_text.logprobs", "include"),
    ],
)
async def test_bad_queries_are_named(stack: RouterStack, query: str, field: str) -> None:
    response_id = await ask(stack, "x")
    response = await stack.client.get(f"{RESPONSES}/{response_id}/input_items?{query}")
    assert (response.status_code, response.json()["error"]["param"]) == (400, field)


async def test_what_asks_for_nothing_may_be_included(
    client: AsyncOpenAI, stack: RouterStack
) -> None:
    response_id = await ask(stack, "x")
    items = client.responses.input_items.list(
        response_id, include=["reasoning.encrypted_content", "message.input_image.image_url"]
    )
    assert len([item async for item in items]) == 1
    with pytest.raises(openai.NotFoundError):
        await client.responses.input_items.list("resp_no")
