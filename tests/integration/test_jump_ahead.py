"""Jumps over forced tokens through real processes: the tokens of an engine that never jumps."""

import asyncio
import itertools
import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from tandem_stack import MODEL, TandemStack

from engine import LLM, SamplingParams, StructuredOutputsParams

STACKS = {
    "1P1D": (),
    "1P1D, steps ahead": ("--async-scheduling",),
    "colocated": ("--prefill-workers", "0", "--max-num-batched-tokens", "16"),
}
PROMPT = list(range(1000, 1040))
SCHEMA = {
    "type": "object",
    "properties": {
        "customer_identification_number": {"type": "integer", "minimum": 0, "maximum": 99999},
        "is_returning_customer": {"type": "boolean"},
        "nickname": {"type": "string", "pattern": "^[a-d]{2,6}$"},
    },
    "required": ["customer_identification_number", "is_returning_customer", "nickname"],
    "additionalProperties": False,
}
SAMPLINGS: tuple[dict[str, Any], ...] = (
    {"temperature": 0.0},
    {"temperature": 1.0, "n": 3},
    {"temperature": 1.5, "frequency_penalty": 1.0, "logprobs": 1},
    {"temperature": 1.0, "stop": ["is_ret"]},
    {"temperature": 1.0, "max_tokens": 4},
)


def body(sampling: dict[str, Any]) -> dict[str, Any]:
    held = {"structured_outputs": {"json": SCHEMA}, "return_token_ids": True}
    common = {"model": MODEL, "prompt": PROMPT, "max_tokens": 120, "seed": 11}
    return common | held | sampling


@pytest.fixture(scope="module")
def expected() -> list[list[list[int]]]:
    llm = LLM(dtype="float32", jump_ahead=False, kv_cache_memory_bytes=1 << 28)
    grammar = StructuredOutputsParams(json=SCHEMA)
    samplings = [
        SamplingParams(**({"seed": 11, "max_tokens": 120, "structured_outputs": grammar} | each))
        for each in SAMPLINGS
    ]
    answers = llm.generate(
        [{"prompt_token_ids": PROMPT}] * len(samplings), samplings, use_tqdm=False
    )
    return [[output.token_ids for output in answer.outputs] for answer in answers]


@pytest.fixture(scope="module", params=STACKS, ids=str)
def stack(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[TandemStack]:
    log = tmp_path_factory.mktemp("stack") / "log"
    arguments = ("--dtype", "float32", "--disable-log-requests")
    with TandemStack(log, *STACKS[request.param], *arguments, name=request.param) as running:
        yield running


def test_same_tokens_at_once(stack: TandemStack, expected: list[list[list[int]]]) -> None:
    async def ask_all() -> list[dict[str, Any]]:
        async with httpx.AsyncClient(base_url=stack.url, timeout=200.0) as client:
            posts = (client.post("/v1/completions", json=body(each)) for each in SAMPLINGS)
            return [answer.raise_for_status().json() for answer in await asyncio.gather(*posts)]

    answers = asyncio.run(ask_all())
    found = [[choice["token_ids"] for choice in answer["choices"]] for answer in answers]
    assert found == expected
    counts = [answer["usage"]["completion_tokens"] for answer in answers]
    assert counts == [sum(map(len, outputs)) for outputs in expected]
    stack.wait_idle()


def test_a_jump_streams_as_one_piece(stack: TandemStack, expected: list[list[list[int]]]) -> None:
    options = {"stream": True, "stream_options": {"continuous_usage_stats": True}}
    asked = {**body(SAMPLINGS[0]), **options}
    pieces: list[list[int]] = []
    with httpx.stream("POST", f"{stack.url}/v1/completions", json=asked, timeout=200.0) as answer:
        for line in answer.iter_lines():
            if not line.startswith("data: {"):
                continue
            event = json.loads(line.removeprefix("data: "))
            pieces += [choice["token_ids"] for choice in event["choices"]]
            assert event["usage"]["completion_tokens"] == sum(map(len, pieces))
    assert [*itertools.chain(*pieces)] == expected[0][0]
    # A piece a step, of which there are ten, the keys being forced; where the machine is busy,
    # pieces come joined, but never divided.
    assert len(pieces) <= len(expected[0][0]) // 2


def test_workers_count_them(stack: TandemStack) -> None:
    """Runs last: what the tests before have left in the counters."""
    for name in stack.workers():
        assert stack.metric("tandem:forced_tokens_total", name) > 0, name
