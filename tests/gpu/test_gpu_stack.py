"""Workers on one card, or each on its own: token for token what transformers says."""

import asyncio
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from greedy_reference import GreedyReference
from tandem_stack import TandemStack

STACKS = {"1P1D": (), "colocated": ("--prefill-workers", "0")}


@pytest.fixture(scope="module", params=STACKS, ids=str)
def stack(
    request: pytest.FixtureRequest, model_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[TandemStack]:
    """Each worker takes its default share of a card; every message's checksum is verified."""
    log = tmp_path_factory.mktemp("stack") / "log"
    arguments = ("--model", str(model_dir), "--served-model-name", "tiny", "--dtype", "float32")
    options = ("--max-num-batched-tokens", "256", "--verify-kv-checksums")
    name = request.param
    with TandemStack(log, *arguments, *options, *STACKS[name], name=name) as running:
        yield running


def ask(stack: TandemStack, prompts: list[list[int]]) -> list[list[int]]:
    """Token ids of the answers; all at once, each as a request of its own."""

    async def one(client: httpx.AsyncClient, prompt: list[int]) -> list[int]:
        answer = await client.post(
            "/v1/completions",
            json={
                "model": "tiny",
                "prompt": prompt,
                "temperature": 0,
                "max_tokens": GreedyReference.max_tokens,
                "return_token_ids": True,
            },
        )
        assert answer.status_code == 200, answer.text
        return answer.json()["choices"][0]["token_ids"]

    async def run() -> list[list[int]]:
        async with httpx.AsyncClient(base_url=stack.url, timeout=120.0) as client:
            return list(await asyncio.gather(*(one(client, prompt) for prompt in prompts)))

    return asyncio.run(run())


def test_alone_at_once_and_cached(
    stack: TandemStack, prompts: list[list[int]], reference: GreedyReference
) -> None:
    expected = [reference(prompt) for prompt in prompts]
    assert [ask(stack, [prompt])[0] for prompt in prompts] == expected
    batch = [prompt[1:] for prompt in prompts if len(prompt) > 1]
    assert ask(stack, batch) == [reference(prompt) for prompt in batch]
    assert ask(stack, prompts) == expected
    stack.wait_idle()
    received = stack.metric("tandem:kv_transfer_received_bytes_total", "decode-0")
    assert (received > 0) == (stack.name == "1P1D")
    assert "GB/s between two workers" not in stack.output()
