"""Through real processes, greedy output equals transformers', token for token, in float32."""

import asyncio
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from greedy_reference import GreedyReference
from tandem_stack import MODEL, SETTLE_DEADLINE_S, TandemStack, wait_for

STACKS = {
    "1P1D": (),
    "colocated": ("--prefill-workers", "0"),
    "1P1D, steps ahead": ("--async-scheduling",),
    "2 routers, 2P2D": ("--routers", "2", "--prefill-workers", "2", "--decode-workers", "2"),
}
FLOAT32 = ("--dtype", "float32", "--disable-log-requests")


@pytest.fixture(scope="module", params=STACKS, ids=str)
def stack(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[TandemStack]:
    log = tmp_path_factory.mktemp("stack") / "log"
    # Small chunks, so that long prompts travel in many pieces.
    chunks = ("--max-num-batched-tokens", "512")
    arguments = (*STACKS[request.param], *FLOAT32, *chunks)
    with TandemStack(log, *arguments, name=request.param) as running:
        yield running


class Answers:
    """Token ids of the outputs, and how many prompt tokens came from the prefix cache."""

    def __init__(self, bodies: list[dict]) -> None:
        self.token_ids = [body["choices"][0]["token_ids"] for body in bodies]
        self.num_cached = [
            (body["usage"]["prompt_tokens_details"] or {}).get("cached_tokens", 0)
            for body in bodies
        ]


def ask(stack: TandemStack, prompts: list[list[int]]) -> Answers:
    """All at once, each as a request of its own."""

    async def run() -> list[dict]:
        limits = httpx.Limits(max_connections=64)
        async with httpx.AsyncClient(base_url=stack.url, timeout=300.0, limits=limits) as client:
            return list(await asyncio.gather(*(one(client, prompt) for prompt in prompts)))

    async def one(client: httpx.AsyncClient, prompt: list[int]) -> dict:
        answer = await client.post(
            "/v1/completions",
            json={
                "model": MODEL,
                "prompt": prompt,
                "temperature": 0,
                "max_tokens": GreedyReference.max_tokens,
                "return_token_ids": True,
            },
        )
        assert answer.status_code == 200, answer.text
        return answer.json()

    return Answers(asyncio.run(run()))


def test_alone(stack: TandemStack, prompts: list[list[int]], reference: GreedyReference) -> None:
    """The longest two, which take many seconds, through one stack apart and one together."""
    for prompt in prompts[: None if stack.name in ("1P1D", "colocated") else -2]:
        [found] = ask(stack, [prompt]).token_ids
        assert found == reference(prompt, found), len(prompt)
    stack.wait_idle()


def test_32_at_once(
    stack: TandemStack, prompts: list[list[int]], reference: GreedyReference
) -> None:
    short = [prompt[:200] for prompt in prompts]
    batch = [*short, *(prompt[1:] for prompt in short)]
    found = ask(stack, batch).token_ids
    assert found == reference.answers(batch, found)
    stack.wait_idle()


def test_shared_prefix_asked_twice(
    stack: TandemStack, prompts: list[list[int]], reference: GreedyReference
) -> None:
    # With their endings, each is longer than a chunk.
    prefix, *endings = prompts[-3], prompts[3], prompts[5], prompts[8]
    batch = [prefix + ending for ending in endings]
    found = ask(stack, batch).token_ids
    expected = reference.answers(batch, found)
    assert found == expected

    def is_found() -> bool:
        again = ask(stack, batch)
        assert again.token_ids == expected
        return min(again.num_cached) >= len(prefix) // 16 * 16

    # Each router hears of cached blocks on its own, a moment behind the answers.
    wait_for(is_found, "the prefix to be found from everywhere", SETTLE_DEADLINE_S)
    stack.wait_idle()


def test_every_prompt_was_prefilled_where_it_should(stack: TandemStack) -> None:
    """Runs last: what the tests before have left in the counters."""
    prefill = [name for name, worker in stack.workers().items() if worker["role"] == "prefill"]
    received = sum(
        stack.metric("tandem:kv_transfer_received_bytes_total", name)
        for name, worker in stack.workers().items()
        if worker["role"] == "decode"
    )
    if prefill:
        assert all(stack.metric("vllm:prompt_tokens_total", name) > 0 for name in prefill)
        assert received > 0
    else:
        assert received == 0


@pytest.mark.parametrize("mode", ["recompute", "swap"])
def test_after_preemption(
    prompts: list[list[int]], reference: GreedyReference, tmp_path: Path, mode: str
) -> None:
    batch = [prompt for prompt in prompts if len(prompt) < 200]
    num_blocks = sum(-(-len(prompt) // 16) for prompt in batch) + 3
    arguments = ("--num-gpu-blocks-override", str(num_blocks), "--no-enable-prefix-caching")
    swapping = ("--preemption-mode", mode, "--swap-space", "0.1")
    with TandemStack(tmp_path / "log", *FLOAT32, *arguments, *swapping) as stack:
        for _ in range(3):
            found = ask(stack, batch).token_ids
            assert found == reference.answers(batch, found)
        assert stack.metric("vllm:num_preemptions_total", "decode-0") > 0
        stack.wait_idle()
        assert stack.metric("vllm:num_requests_swapped", "decode-0") == 0


def test_prompt_logprobs(
    stack: TandemStack, prompts: list[list[int]], reference: GreedyReference
) -> None:
    """As evaluation harnesses ask for likelihoods; the second time the prompt is cached."""
    for prompt in (prompts[0], prompts[10], prompts[-3], prompts[-3]):
        body = {"prompt": prompt, "max_tokens": 1, "echo": True, "logprobs": 1, "temperature": 0}
        answer = httpx.post(f"{stack.url}/v1/completions", json=body, timeout=300.0).json()
        first, *logprobs = answer["choices"][0]["logprobs"]["token_logprobs"]
        assert first is None
        assert logprobs[:-1] == pytest.approx(reference.prompt_logprobs(prompt), abs=2e-3)
    stack.wait_idle()


def test_embeddings(
    stack: TandemStack, prompts: list[list[int]], reference: GreedyReference
) -> None:
    body = {"input": prompts[:-2]}
    answer = httpx.post(f"{stack.url}/v1/embeddings", json=body, timeout=300.0).json()
    for prompt, item in zip(prompts[:-2], answer["data"], strict=True):
        assert item["embedding"] == pytest.approx(reference.embedding(prompt), abs=1e-3)
    stack.wait_idle()
