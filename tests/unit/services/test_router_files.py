"""/v1/files: uploads in pieces, lists in pages, and what is refused."""

import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import openai
import pytest
import pytest_asyncio
from openai import AsyncOpenAI
from router_stack import RouterStack, open_router_stack

from services.router.batch.files import CHUNK_BYTES

pytestmark = pytest.mark.asyncio(loop_scope="module")

MAX_BYTES = 3 * CHUNK_BYTES


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def stack(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[RouterStack]:
    async with open_router_stack(
        tmp_path_factory.mktemp("router"), max_file_bytes=MAX_BYTES
    ) as stack:
        yield stack


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def client(stack: RouterStack) -> AsyncIterator[AsyncOpenAI]:
    async with AsyncOpenAI(base_url=f"{stack.url}/v1", api_key="x", max_retries=0) as client:
        yield client


async def upload(stack: RouterStack, content: bytes, **fields: str) -> httpx.Response:
    return await stack.client.post(
        "/v1/files", data={"purpose": "batch"} | fields, files={"file": ("in.jsonl", content)}
    )


def error_of(response: httpx.Response) -> tuple[int, Any, Any]:
    error = response.json()["error"]
    return response.status_code, error["param"], error["code"]


@pytest.mark.parametrize("size", [0, 1, CHUNK_BYTES - 1, CHUNK_BYTES, 2 * CHUNK_BYTES + 7])
async def test_what_goes_in_comes_out(client: AsyncOpenAI, size: int) -> None:
    content = bytes(i % 251 for i in range(size))
    file = await client.files.create(file=("ä.jsonl", content), purpose="batch")
    assert (file.bytes, file.filename, file.purpose) == (size, "ä.jsonl", "batch")
    assert await client.files.retrieve(file.id) == file
    assert (await client.files.content(file.id)).content == content
    deleted = await client.files.delete(file.id)
    assert deleted.deleted
    with pytest.raises(openai.NotFoundError):
        await client.files.content(file.id)


async def test_lists_have_pages(client: AsyncOpenAI) -> None:
    made = [(await client.files.create(file=b"{}", purpose="batch")).id for _ in range(5)]
    newest_first = [file.id async for file in client.files.list(limit=2)]
    assert newest_first == made[::-1]
    page = await client.files.list(order="asc", after=made[1], limit=2)
    assert [file.id for file in page.data] == made[2:4]
    assert page.has_more
    await client.files.delete(made[4])
    page = await client.files.list(order="asc", after=made[1], limit=2)
    assert not page.has_more
    assert (await client.files.list(purpose="batch_output")).data == []
    for file_id in made[:4]:
        await client.files.delete(file_id)


async def test_the_client_says_how_long_a_file_is_kept(client: AsyncOpenAI) -> None:
    file = await client.files.create(
        file=b"{}", purpose="batch", expires_after={"anchor": "created_at", "seconds": 3600}
    )
    assert file.expires_at == file.created_at + 3600


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"purpose": "fine-tune"}, "purpose"),
        ({"expires_after[seconds]": "5"}, "expires_after[seconds]"),
        ({"expires_after[seconds]": "x"}, "expires_after[seconds]"),
        ({"expires_after[anchor]": "now"}, "expires_after[anchor]"),
        ({"purpose": "x" * 10_000}, "purpose"),
    ],
)
async def test_bad_fields_are_named(stack: RouterStack, fields: dict[str, str], field: str) -> None:
    assert error_of(await upload(stack, b"{}", **fields))[:2] == (400, field)


async def test_a_file_can_be_too_long(stack: RouterStack) -> None:
    keys = await count_keys(stack)
    response = await upload(stack, bytes(MAX_BYTES + 1))
    assert error_of(response) == (413, None, "request_too_large")
    assert await count_keys(stack) == keys


async def count_keys(stack: RouterStack) -> int:
    return len(await stack.service._redis.keys("tandem:file:*"))


async def test_forms_that_are_none(stack: RouterStack) -> None:
    post = stack.client.post
    form = {"Content-Type": "multipart/form-data; boundary=b"}
    assert error_of(await post("/v1/files", json={}))[1:] == ("file", "invalid_content_type")
    assert error_of(await post("/v1/files", headers=form, content=b"x"))[0] == 400
    assert error_of(await post("/v1/files", headers=form, content=b"--b\r\n"))[0] == 400
    assert error_of(await post("/v1/files", headers=form, content=b""))[0] == 400
    without_file = await post("/v1/files", files={"purpose": (None, "batch")})
    assert error_of(without_file) == (400, "file", "missing_required_parameter")
    without_purpose = await post("/v1/files", files={"file": ("a", b"{}")})
    assert error_of(without_purpose) == (400, "purpose", "missing_required_parameter")
    twice = [("file", ("a", b"1")), ("file", ("b", b"2"))]
    assert error_of(await post("/v1/files", files=twice))[:2] == (400, "file")


@pytest.mark.parametrize(
    ("query", "field"),
    [("limit=0", "limit"), ("limit=x", "limit"), ("order=up", "order"), ("after=file-1", "after")],
)
async def test_bad_queries_are_named(stack: RouterStack, query: str, field: str) -> None:
    assert error_of(await stack.client.get(f"/v1/files?{query}"))[:2] == (400, field)


async def test_methods_and_ids_that_are_not_there(stack: RouterStack) -> None:
    assert (await stack.client.put("/v1/files")).status_code == 405
    for path in ("/v1/files/file-1", "/v1/files/file-1/content"):
        assert error_of(await stack.client.get(path)) == (404, None, "file_not_found")


async def test_the_schema_describes_uploads(stack: RouterStack) -> None:
    schema = json.loads((await stack.client.get("/openapi.json")).content)
    body = schema["paths"]["/v1/files"]["post"]["requestBody"]["content"]["multipart/form-data"]
    assert set(body["schema"]["required"]) == {"file", "purpose"}
    assert set(schema["paths"]["/v1/batches"]) == {"get", "post"}


async def test_without_redis_clients_are_told(tmp_path_factory: pytest.TempPathFactory) -> None:
    async with open_router_stack(tmp_path_factory.mktemp("router")) as stack:
        stack.kill_redis()
        await stack.redis.wait()
        for response in (await stack.client.get("/v1/files"), await upload(stack, b"{}")):
            assert error_of(response) == (503, None, "storage_unavailable")
