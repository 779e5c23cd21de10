"""A router whose model only embeds: what it answers, what it refuses, who gets the work."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from router_stack import RouterStack, open_router_stack, write_toy_model
from tiny_encoders import write_encoder, write_pooling

from protocol.errors import StartupError
from services.router.placement.candidates import DecodeCandidate, PlacementPolicy, RequestFacts
from services.router.placement.placement import place
from services.router.served_model import ServedModel

EMBEDDINGS = "/v1/embeddings"


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    # As many positions as the workers of this stack say they serve.
    write_encoder(path, "BertModel", max_position_embeddings=512)
    write_pooling(path, pooling_mode_cls_token=True)
    return path


@pytest.fixture
async def stack(tmp_path: Path, model_dir: Path) -> AsyncIterator[RouterStack]:
    async with open_router_stack(tmp_path, model_dir=model_dir) as stack:
        await stack.add_worker("encode")
        yield stack


async def sent(stack: RouterStack, **body: Any) -> list[list[int]]:
    """The token ids that the worker got for it."""
    worker = stack.workers[0]
    worker.requests.clear()
    response = await stack.post(EMBEDDINGS, body)
    assert response.status_code == 200, response.text
    return [request.token_ids for request in worker.requests]


async def test_texts_get_their_special_tokens_and_token_ids_stay(stack: RouterStack) -> None:
    assert await sent(stack, input="The cat.") == [[2, 4, 5, 12, 3]]
    assert await sent(stack, input="The cat.", add_special_tokens=False) == [[4, 5, 12]]
    assert await sent(stack, input=[[4, 5], [6]]) == [[4, 5], [6]]
    (request,) = stack.workers[0].requests[:1]
    assert request.pooling is not None
    assert request.pooling.type == "cls"


async def test_the_whole_context_is_for_the_text(stack: RouterStack) -> None:
    assert await sent(stack, input=[4] * 512) == [[4] * 512]
    response = await stack.post(EMBEDDINGS, {"input": ["cat", "cat " * 511]})
    assert response.status_code == 400
    error = response.json()["error"]
    assert (error["param"], error["code"]) == ("input", "context_length_exceeded")
    assert "one in `input` has 513" in error["message"]
    (cut,) = await sent(stack, input="dog " + "cat " * 3000, truncate_prompt_tokens=-1)
    assert cut == [2, 8, *[5] * 509, 3]


async def test_cutting_keeps_a_texts_beginning_and_its_end_mark(stack: RouterStack) -> None:
    assert await sent(stack, input="the cat sat", truncate_prompt_tokens=4) == [[2, 4, 5, 3]]
    assert await sent(stack, input="the cat sat", truncate_prompt_tokens=5) == [[2, 4, 5, 6, 3]]
    assert await sent(stack, input=[4, 5, 6], truncate_prompt_tokens=2) == [[4, 5]]
    assert await sent(stack, input="the cat", truncate_prompt_tokens=1) == [[3]]


async def test_much_space_is_no_long_text(stack: RouterStack) -> None:
    assert await sent(stack, input="the" + " " * 50_000 + "cat") == [[2, 4, 5, 3]]


async def test_a_hopeless_text_isnt_encoded(stack: RouterStack) -> None:
    text = "the" + " " * 100_000 + "cat"
    response = await stack.post(EMBEDDINGS, {"input": text})
    assert response.status_code == 400
    assert "100006 characters" in response.json()["error"]["message"]
    (cut,) = await sent(stack, input=[text], truncate_prompt_tokens=-1)
    assert cut == [2, 4, 3]


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        (EMBEDDINGS, {"input": "a", "truncate_prompt_tokens": 513}, "truncate_prompt_tokens"),
        (EMBEDDINGS, {"input": "a", "truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
        (EMBEDDINGS, {"input": "", "add_special_tokens": False}, "input"),
        (EMBEDDINGS, {"input": [97]}, "input"),
        (EMBEDDINGS, {"input": "a", "dimensions": 33}, "dimensions"),
        ("/v1/score", {"text_1": "a", "text_2": ["b", "cat " * 600]}, "text_2"),
        ("/v1/rerank", {"query": "cat " * 600, "documents": ["b"]}, "query"),
        ("/v1/completions", {"prompt": "a"}, "model"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}]}, "model"),
        ("/v1/responses", {"input": "a"}, "model"),
        ("/tokenize", {"messages": [{"role": "user", "content": "a"}]}, "messages"),
    ],
)
async def test_what_is_refused(
    stack: RouterStack, path: str, body: dict[str, Any], param: str
) -> None:
    response = await stack.post(path, body)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert (error["param"], error["type"]) == (param, "invalid_request_error")


async def test_refusals_say_what_else_there_is(stack: RouterStack) -> None:
    error = (await stack.post("/v1/completions", {"prompt": "a"})).json()["error"]
    assert "only embeds" in error["message"]
    assert EMBEDDINGS in error["message"]
    assert error["code"] == "unsupported_by_model"
    answer = (await stack.post("/v1/messages", {"messages": []})).json()
    assert answer["type"] == "error"
    assert "only embeds" in answer["error"]["message"]


async def test_what_is_around_it(stack: RouterStack) -> None:
    card = (await stack.client.get("/v1/models/toy")).json()
    assert card["max_model_len"] == 512
    tokens = (await stack.post("/tokenize", {"prompt": "Unbelievable cat."})).json()["tokens"]
    assert tokens == [2, 9, 10, 11, 5, 12, 3]
    text = (await stack.post("/detokenize", {"tokens": tokens})).json()["prompt"]
    assert text == "[CLS] unbelievable cat. [SEP]"
    assert (await stack.client.get("/health")).status_code == 200
    reset = await stack.client.post("/reset_prefix_cache")
    assert reset.json()["num_dropped_blocks"] == 0


async def test_only_encode_workers_count(tmp_path: Path, model_dir: Path) -> None:
    async with open_router_stack(tmp_path, model_dir=model_dir) as stack:
        await stack.add_worker("decode")
        response = await stack.client.get("/health")
        assert response.status_code == 503
        assert "No encode worker" in response.json()["error"]["message"]
        await stack.add_worker("encode")
        assert (await stack.client.get("/health")).status_code == 200


def test_pooling_of_the_operators(model_dir: Path, tmp_path: Path) -> None:
    model = ServedModel.from_dir(model_dir, names=("m",))
    assert model.pooling_for("auto") == "cls"
    assert model.pooling_for("mean") == "mean"
    decoder = ServedModel.from_dir(write_toy_model(tmp_path), names=("m",))
    with pytest.raises(StartupError, match="is for encoders"):
        decoder.pooling_for("cls")


def test_texts_go_where_the_queue_is_shortest() -> None:
    def worker(name: str, **load: int) -> DecodeCandidate:
        return DecodeCandidate(worker_id=name, num_blocks=0, num_free_blocks=0, **load)

    facts = RequestFacts(num_tokens=100, num_output_tokens=1, is_transferred=False)
    busy = worker("busy", num_queued_tokens=5000, num_waiting=50, num_running=256)
    full = worker("full", num_waiting=300, num_running=256)
    placement = place(facts, [], [busy, full, worker("idle")], PlacementPolicy())
    assert placement is not None
    assert (placement.chosen.prefill, placement.chosen.decode) == (None, "idle")
