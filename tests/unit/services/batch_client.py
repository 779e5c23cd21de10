"""What tests of /v1/batches do with OpenAI's client."""

import asyncio
import json
from typing import Any

from openai import AsyncOpenAI
from openai.types import Batch
from router_stack import DEADLINE_S, MODEL

COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"
OVER = ("completed", "failed", "expired", "cancelled")


def line(custom_id: str, url: str = COMPLETIONS, **body: Any) -> dict[str, Any]:
    if url == CHAT:
        body.setdefault("messages", [{"role": "user", "content": "hé"}])
    else:
        body.setdefault("prompt", "abc")
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": {"model": MODEL} | body}


async def create(client: AsyncOpenAI, lines: list[Any], endpoint: Any = COMPLETIONS) -> Batch:
    texts = [each if isinstance(each, str) else json.dumps(each) for each in lines]
    file = await client.files.create(file="\n".join(texts).encode(), purpose="batch")
    return await client.batches.create(
        input_file_id=file.id, endpoint=endpoint, completion_window="24h"
    )


async def ended(client: AsyncOpenAI, batch: Batch) -> Batch:
    async with asyncio.timeout(DEADLINE_S):
        while batch.status not in OVER:
            await asyncio.sleep(0.02)
            batch = await client.batches.retrieve(batch.id)
    return batch


async def results(client: AsyncOpenAI, file_id: str | None) -> list[dict[str, Any]]:
    assert file_id is not None
    content = (await client.files.content(file_id)).content
    assert content.endswith(b"\n")
    return [json.loads(each) for each in content.splitlines()]


async def until_completed(client: AsyncOpenAI, batch: Batch, count: int) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while batch.request_counts is None or batch.request_counts.completed < count:
            await asyncio.sleep(0.02)
            batch = await client.batches.retrieve(batch.id)
