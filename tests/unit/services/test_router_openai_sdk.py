"""OpenAI's own client, sync and async, understands every answer and every error."""

import asyncio
from collections.abc import AsyncIterator

import openai
import pytest
import pytest_asyncio
from openai import AsyncOpenAI, OpenAI
from openai.types.chat import ChatCompletionMessageParam
from router_stack import MODEL, RouterStack, open_router_stack

pytestmark = pytest.mark.asyncio(loop_scope="module")

MESSAGES: list[ChatCompletionMessageParam] = [{"role": "user", "content": "hé"}]
KEY = "secret-key"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def stack(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[RouterStack]:
    path = tmp_path_factory.mktemp("router")
    async with open_router_stack(path, api_keys=("other", KEY)) as stack:
        await stack.add_worker()
        yield stack


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def client(stack: RouterStack) -> AsyncIterator[AsyncOpenAI]:
    async with AsyncOpenAI(base_url=f"{stack.url}/v1", api_key=KEY, max_retries=0) as client:
        yield client


async def test_async_chat(client: AsyncOpenAI) -> None:
    answer = await client.chat.completions.create(
        model=MODEL, messages=MESSAGES, max_tokens=9, logprobs=True, top_logprobs=1
    )
    assert answer.choices[0].message.content == "user\nhé"
    assert answer.choices[0].logprobs is not None
    assert answer.usage is not None
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens == 0


async def test_async_stream(client: AsyncOpenAI) -> None:
    stream = await client.chat.completions.create(
        model=MODEL,
        messages=MESSAGES,
        max_tokens=9,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = [chunk async for chunk in stream]
    parts = [choice.delta.content or "" for chunk in chunks for choice in chunk.choices]
    assert "".join(parts) == "user\nhé"
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 9


async def test_sync_client(stack: RouterStack) -> None:
    def talk() -> tuple[str | None, str, list[str]]:
        with OpenAI(base_url=f"{stack.url}/v1", api_key=KEY, max_retries=0) as client:
            answer = client.chat.completions.create(model=MODEL, messages=MESSAGES, max_tokens=9)
            stream = client.completions.create(model=MODEL, prompt="abc", max_tokens=6, stream=True)
            text = "".join(chunk.choices[0].text for chunk in stream)
            models = [model.id for model in client.models.list()]
            return answer.choices[0].message.content, text, models

    assert await asyncio.to_thread(talk) == ("user\nhé", "abcabc", [MODEL, "alias"])


async def test_errors_have_their_own_classes(client: AsyncOpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as bad:
        await client.chat.completions.create(model=MODEL, messages=MESSAGES, temperature=-1)
    assert (bad.value.param, bad.value.code) == ("temperature", "invalid_value")
    with pytest.raises(openai.NotFoundError) as missing:
        await client.chat.completions.create(model="gpt-9", messages=MESSAGES)
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as long:
        await client.completions.create(model=MODEL, prompt="a" * 1000)
    assert long.value.code == "context_length_exceeded"


@pytest.mark.parametrize("key", ["Bearer wrong", f"Basic {KEY}", "Bearer sécret", KEY])
async def test_a_wrong_key_is_refused(stack: RouterStack, key: str) -> None:
    headers = {"Authorization": key.encode()}
    guarded = ("/v1/models", "/v1/chat/completions", "/tokenize", "/load_config", "/v1/nothing")
    for path in (*guarded, "/score", "/rerank", "/v2/rerank"):
        response = await stack.client.get(path, headers=headers)  # type: ignore[arg-type]
        assert response.status_code == 401
        assert response.json()["error"]["code"] == "invalid_api_key"


async def test_the_sdk_knows_a_wrong_key(stack: RouterStack) -> None:
    async with AsyncOpenAI(base_url=f"{stack.url}/v1", api_key="no", max_retries=0) as client:
        with pytest.raises(openai.AuthenticationError):
            await client.models.list()


async def test_probes_need_no_key(stack: RouterStack) -> None:
    for path in ("/health", "/metrics", "/version", "/ping"):
        assert (await stack.client.get(path)).status_code == 200
