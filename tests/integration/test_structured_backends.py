"""A whole stack with each library that follows grammars, its router's trial process included."""

import json
import re
import time
from collections.abc import Iterator

import jsonschema
import openai
import pytest
from schema_suite import SCHEMAS
from tandem_stack import MODEL, TandemStack

from engine import LLM, SamplingParams, StructuredOutputsParams

PROMPT = "Answer in JSON."


@pytest.fixture(scope="module", params=["llguidance", "xgrammar", "outlines"])
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def stack(backend: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TandemStack]:
    log = tmp_path_factory.mktemp(backend) / "log"
    with TandemStack(log, "--guided-decoding-backend", backend) as running:
        yield running


@pytest.fixture
def client(stack: TandemStack) -> Iterator[openai.OpenAI]:
    url = f"{stack.url}/v1"
    with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client:
        yield client


def test_outputs_obey(stack: TandemStack, backend: str, client: openai.OpenAI) -> None:
    assert stack.output().count(f"structured outputs by {backend}") == 3, "router and workers"
    for name in ("string-2", "choice-4", "array-3", "object-1"):
        schema = SCHEMAS[name]
        answer = client.chat.completions.create(
            model=MODEL,
            messages=[{"role": "user", "content": f"{name}: {PROMPT}"}],
            response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": schema}},
            seed=1,
            max_tokens=200,
        )
        jsonschema.validate(json.loads(answer.choices[0].message.content or ""), schema)
    asked = {
        "yes|no": {"guided_choice": ["yes", "no"], "guided_decoding_backend": backend},
        "[A-Z][a-z]{2,6}": {"structured_outputs": {"regex": "[A-Z][a-z]{2,6}", "backend": "auto"}},
    }
    for pattern, extra in asked.items():
        answer = client.completions.create(
            model=MODEL, prompt=PROMPT, max_tokens=16, n=2, extra_body=extra
        )
        assert all(re.fullmatch(pattern, choice.text) for choice in answer.choices)


def test_what_the_library_lacks_is_refused(backend: str, client: openai.OpenAI) -> None:
    def ask(**extra: object) -> None:
        client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=4, extra_body=extra)

    others = {"llguidance", "xgrammar", "outlines"} - {backend}
    with pytest.raises(openai.BadRequestError, match="can't differ") as refusal:
        ask(guided_regex="a", guided_decoding_backend=others.pop())
    assert refusal.value.param == "guided_decoding_backend"
    if backend == "outlines":
        with pytest.raises(openai.BadRequestError, match="llguidance and xgrammar do") as refusal:
            ask(guided_grammar='root ::= "a"')
        assert refusal.value.param == "guided_grammar"
    else:
        ask(guided_grammar='root ::= "a" | "b"')
        ask(guided_grammar='start: "a" | "b"')


def test_harm_is_refused_while_others_are_served(backend: str, client: openai.OpenAI) -> None:
    started = time.monotonic()
    harmful = {"type": "object", "properties": {f"k{i}": {"type": "string"} for i in range(2000)}}

    def ask() -> None:
        client.completions.create(
            model=MODEL, prompt=PROMPT, max_tokens=1, extra_body={"guided_json": harmful}
        )

    if backend == "llguidance":
        ask()
    else:
        with pytest.raises(openai.BadRequestError, match="allowed") as refusal:
            ask()
        assert refusal.value.param == "guided_json"
    assert time.monotonic() - started < 30
    answer = client.completions.create(
        model=MODEL, prompt=PROMPT, max_tokens=4, extra_body={"guided_choice": ["yes", "no"]}
    )
    assert answer.choices[0].text in ("yes", "no")


@pytest.mark.parametrize("name", ["xgrammar", "outlines"])
def test_an_llm_takes_any_of_them(name: str) -> None:
    llm = LLM(kv_cache_memory_bytes=1 << 27, guided_decoding_backend=name)
    params = StructuredOutputsParams(regex="[0-9]{3}-[0-9]{4}")
    sampling = SamplingParams(temperature=1.0, seed=0, max_tokens=32, structured_outputs=params)
    for output in llm.generate([PROMPT] * 3, sampling, use_tqdm=False):
        assert re.fullmatch("[0-9]{3}-[0-9]{4}", output.outputs[0].text)
