"""What is answered about prompts themselves: logprobs, echo, vectors, scores."""

import base64
import struct
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from openai import AsyncOpenAI
from router_stack import RouterStack, open_router_stack

CHAT, COMPLETIONS, EMBEDDINGS = "/v1/chat/completions", "/v1/completions", "/v1/embeddings"


@pytest.fixture
async def stack(tmp_path: Path) -> AsyncIterator[RouterStack]:
    async with open_router_stack(tmp_path) as stack:
        await stack.add_worker()
        yield stack


async def complete(stack: RouterStack, **fields: Any) -> dict[str, Any]:
    response = await stack.post(COMPLETIONS, {"prompt": "abc", "max_tokens": 2} | fields)
    assert response.status_code == 200, response.text
    return response.json()


async def test_prompt_logprobs_of_a_completion(stack: RouterStack) -> None:
    answer = await complete(stack, prompt_logprobs=1)
    (choice,) = answer["choices"]
    first, *others = choice["prompt_logprobs"]
    assert first is None
    assert [entry["decoded_token"] for named in others for entry in named.values()] == ["b", "c"]
    assert {entry["rank"] for named in others for entry in named.values()} == {1}
    assert choice["logprobs"] is None
    assert "prompt_logprobs" not in (await complete(stack))["choices"][0]


async def test_each_prompt_has_its_own(stack: RouterStack) -> None:
    answer = await complete(stack, prompt=["abcd", "xy"], prompt_logprobs=0, n=2)
    lengths = [len(choice["prompt_logprobs"]) for choice in answer["choices"]]
    assert lengths == [4, 4, 2, 2]
    # The prompt is read once, whatever n is.
    asked = [request.sampling.prompt_logprobs for request in stack.workers[0].requests]
    assert sorted(asked, key=str) == [0, 0, None, None]


async def test_prompt_logprobs_of_a_chat(stack: RouterStack) -> None:
    body = {
        "messages": [{"role": "user", "content": "hi"}],
        "max_tokens": 1,
        "prompt_logprobs": 0,
    }
    answer = (await stack.post(CHAT, body)).json()
    assert len(answer["prompt_logprobs"]) == answer["usage"]["prompt_tokens"]


async def test_echo_with_logprobs(stack: RouterStack) -> None:
    (choice,) = (await complete(stack, echo=True, logprobs=1))["choices"]
    assert choice["text"] == "abcab"
    logprobs = choice["logprobs"]
    assert logprobs["tokens"] == list("abcab")
    assert logprobs["token_logprobs"] == [None, -0.5, -0.5, -0.5, -0.5]
    assert logprobs["top_logprobs"] == [None, *({token: -0.5} for token in "bcab")]
    assert logprobs["text_offset"] == [0, 1, 2, 3, 4]
    assert "prompt_logprobs" not in choice


async def test_an_echo_may_be_all(stack: RouterStack) -> None:
    """How likelihoods are asked for: nothing is generated, as far as the client sees."""
    answer = await complete(stack, prompt=[64, 65, 66], echo=True, logprobs=0, max_tokens=0)
    (choice,) = answer["choices"]
    assert choice["text"] == "abc"
    assert choice["logprobs"]["token_logprobs"] == [None, -0.5, -0.5]
    assert choice["finish_reason"] == "length"
    assert answer["usage"]["completion_tokens"] == 0
    response = await stack.post(COMPLETIONS, {"prompt": "abc", "max_tokens": 0})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "max_tokens"


async def test_echo_with_logprobs_in_a_stream(stack: RouterStack) -> None:
    events = await stack.stream(
        COMPLETIONS, {"prompt": "abc", "max_tokens": 2, "echo": True, "logprobs": 0}
    )
    parts = [event["choices"][0] for event in events]
    assert "".join(part["text"] for part in parts) == "abcab"
    logprobs = [part["logprobs"] for part in parts if part["logprobs"]]
    assert [token for entry in logprobs for token in entry["tokens"]] == list("abcab")
    assert [offset for entry in logprobs for offset in entry["text_offset"]] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt_logprobs": -1}, "prompt_logprobs"),
        ({"prompt_logprobs": 21}, "prompt_logprobs"),
        ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
        ({"best_of": 0}, "best_of"),
        ({"best_of": 1, "n": 2}, "best_of"),
        ({"best_of": 129}, "best_of"),
        ({"best_of": 2, "stream": True}, "best_of"),
    ],
)
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
async def test_what_is_refused(
    stack: RouterStack, path: str, fields: dict[str, Any], param: str
) -> None:
    body = {"prompt": "a", "messages": [{"role": "user", "content": "hi"}]}
    response = await stack.post(path, body | fields)
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == param


async def test_the_best_of_several(stack: RouterStack) -> None:
    answer = await complete(stack, prompt=["abc", "xyz"], n=2, best_of=5, max_tokens=3)
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    assert [choice["text"] for choice in answer["choices"]] == ["abc", "abc", "xyz", "xyz"]
    assert all(choice["logprobs"] is None for choice in answer["choices"])
    assert answer["usage"]["completion_tokens"] == 30


async def test_one_token_is_no_business_of_decode(stack: RouterStack) -> None:
    prefill = await stack.add_worker("prefill")
    decode = stack.workers[0]
    (choice,) = (await complete(stack, prompt="x" * 300, max_tokens=1))["choices"]
    assert choice["text"] == "x"
    assert len(prefill.requests) == 1
    assert not decode.requests


async def test_embeddings(stack: RouterStack) -> None:
    async with AsyncOpenAI(base_url=f"{stack.url}/v1", api_key="none") as client:
        for texts, expected in [
            ("abc", [(3, 64, 66)]),
            (["abc", "z"], [(3, 64, 66), (1, 89, 89)]),
            ([64, 65], [(2, 64, 65)]),
            ([[64, 65], [66]], [(2, 64, 65), (1, 66, 66)]),
        ]:
            # The client asks for base64 and decodes it.
            answer = await client.embeddings.create(model="toy", input=texts)
            assert [tuple(item.embedding) for item in answer.data] == expected
            assert [item.index for item in answer.data] == list(range(len(expected)))
            assert answer.usage.total_tokens == answer.usage.prompt_tokens
    plain = (await stack.post(EMBEDDINGS, {"input": "abc"})).json()
    assert plain["data"][0]["embedding"] == [3, 64, 66]
    assert plain["usage"] == {"prompt_tokens": 3, "total_tokens": 3}
    body = {"input": "abc", "encoding_format": "base64"}
    coded = (await stack.post(EMBEDDINGS, body)).json()["data"][0]["embedding"]
    assert struct.unpack("<3f", base64.b64decode(coded)) == (3, 64, 66)


async def test_what_embeddings_ask_workers_for(stack: RouterStack) -> None:
    await stack.post(EMBEDDINGS, {"input": "abc", "dimensions": 8, "normalize": False})
    (request,) = stack.workers[0].requests
    assert request.pooling is not None
    assert (request.pooling.type, request.pooling.dimensions) == ("last", 8)
    assert not request.pooling.normalize
    assert request.ends_with_prefill


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        (EMBEDDINGS, {}, "input"),
        (EMBEDDINGS, {"input": []}, "input"),
        (EMBEDDINGS, {"input": ""}, "input"),
        (EMBEDDINGS, {"input": ["a", [1]]}, "input"),
        (EMBEDDINGS, {"input": [10**9]}, "input"),
        (EMBEDDINGS, {"input": "x" * 600}, "input"),
        (EMBEDDINGS, {"input": "a", "dimensions": 0}, "dimensions"),
        (EMBEDDINGS, {"input": "a", "dimensions": 65}, "dimensions"),
        (EMBEDDINGS, {"input": "a", "encoding_format": "hex"}, "encoding_format"),
        (EMBEDDINGS, {"input": "a", "priority": 2**40}, "priority"),
        ("/v1/score", {"text_1": "a"}, "text_2"),
        ("/v1/score", {"text_1": [], "text_2": "b"}, "text_1"),
        ("/v1/score", {"text_1": ["a", "b"], "text_2": ["a", "b", "c"]}, "text_1"),
        ("/v1/rerank", {"query": "a", "documents": []}, "documents"),
        ("/v1/rerank", {"query": "a", "documents": ["b"], "top_n": -1}, "top_n"),
        ("/v1/rerank", {"query": "", "documents": ["b"]}, "query"),
    ],
)
async def test_bad_texts(stack: RouterStack, path: str, body: dict[str, Any], param: str) -> None:
    response = await stack.post(path, body)
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == param


async def test_another_model(stack: RouterStack) -> None:
    response = await stack.post(EMBEDDINGS, {"input": "a", "model": "other"})
    assert response.status_code == 404


async def test_scores(stack: RouterStack) -> None:
    answer = (await stack.post("/v1/score", {"text_1": "a", "text_2": ["b", "cc"]})).json()
    scores = [item["score"] for item in answer["data"]]
    # The toy worker's vectors aren't of length 1, so these are plain products.
    assert scores == [1 + 64 * 65 * 2, 2 + 64 * 66 * 2]
    pairs = {"text_1": ["a", "b"], "text_2": ["c", "d"]}
    answer = (await stack.post("/score", pairs)).json()
    assert [item["index"] for item in answer["data"]] == [0, 1]
    assert answer["usage"]["prompt_tokens"] == 4


@pytest.mark.parametrize("path", ["/rerank", "/v1/rerank", "/v2/rerank"])
async def test_rerank(stack: RouterStack, path: str) -> None:
    body = {"query": "q", "documents": ["a", {"text": "zz"}, "m"], "top_n": 2}
    answer = (await stack.post(path, body)).json()
    assert [result["index"] for result in answer["results"]] == [1, 2]
    assert [result["document"]["text"] for result in answer["results"]] == ["zz", "m"]
    best, second = (result["relevance_score"] for result in answer["results"])
    assert best > second
    answer = (await stack.post(path, body | {"return_documents": False})).json()
    assert "document" not in answer["results"][0]
