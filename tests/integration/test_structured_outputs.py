"""Outputs of a real model obey what they were held to, in one process and through P→D."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import jsonschema
import openai
import pytest
from schema_suite import SCHEMAS
from tandem_stack import MODEL, TandemStack

from engine import LLM, SamplingParams, StructuredOutputsParams
from engine.tokenizer import Tokenizer
from protocol.errors import InvalidRequestError

PROMPT = "Answer in JSON."


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM(kv_cache_memory_bytes=1 << 28)


def held_to(params: StructuredOutputsParams, **sampling: object) -> SamplingParams:
    options = {"temperature": 1.0, "max_tokens": 300, "seed": 0, **sampling}
    return SamplingParams(structured_outputs=params, **options)


def test_every_schema_of_the_suite_is_obeyed(llm: LLM) -> None:
    assert len(SCHEMAS) >= 100
    sampling = [held_to(StructuredOutputsParams(json=schema)) for schema in SCHEMAS.values()]
    outputs = llm.generate([PROMPT] * len(SCHEMAS), sampling, use_tqdm=False)
    wrong: dict[str, str] = {}
    for (name, schema), output in zip(SCHEMAS.items(), outputs, strict=True):
        text = output.outputs[0].text
        assert output.outputs[0].finish_reason == "stop", (name, text)
        try:
            jsonschema.validate(json.loads(text), schema, format_checker=jsonschema.FormatChecker())
        except (ValueError, jsonschema.ValidationError) as error:
            wrong[name] = f"{text!r}: {error}"
    assert not wrong


def test_regexes_choices_and_grammars_are_obeyed(llm: LLM) -> None:
    expression = 'root ::= term " + " term\nterm ::= [0-9] | [0-9] [0-9]'
    cases = {
        r"[A-Z][a-z]{2,6} \d{2,4}": StructuredOutputsParams(regex=r"[A-Z][a-z]{2,6} [0-9]{2,4}"),
        "yes|no|maybe so": StructuredOutputsParams(choice=("yes", "no", "maybe so")),
        r"[0-9+ ]+": StructuredOutputsParams(grammar=expression),
    }
    for pattern, params in cases.items():
        for seed in range(4):
            [output] = llm.generate(PROMPT, held_to(params, seed=seed), use_tqdm=False)
            assert output.outputs[0].finish_reason == "stop", pattern
            assert re.fullmatch(pattern, output.outputs[0].text), pattern


def test_a_json_object_is_one_from_its_first_token(llm: LLM) -> None:
    """It has no bound, so it's looked at as far as it comes."""
    params = held_to(StructuredOutputsParams(json_object=True), max_tokens=64)
    [output] = llm.generate(PROMPT, params, use_tqdm=False)
    assert output.outputs[0].text.startswith("{")
    if output.outputs[0].finish_reason == "stop":
        assert isinstance(json.loads(output.outputs[0].text), dict)


def test_free_and_held_sequences_share_a_batch(llm: LLM) -> None:
    free = SamplingParams(temperature=0.0, max_tokens=24)
    [alone] = llm.generate(PROMPT, free, use_tqdm=False)
    choice = held_to(StructuredOutputsParams(choice=("left", "right")), temperature=0.0)
    together = llm.generate([PROMPT] * 3, [choice, free, choice], use_tqdm=False)
    assert together[1].outputs[0].token_ids == alone.outputs[0].token_ids
    assert {together[0].outputs[0].text, together[2].outputs[0].text} <= {"left", "right"}


def test_the_end_of_a_grammar_wins_over_min_tokens(llm: LLM) -> None:
    sampling = held_to(StructuredOutputsParams(choice=("no",)), min_tokens=50)
    [output] = llm.generate(PROMPT, sampling, use_tqdm=False)
    assert output.outputs[0].text == "no"
    assert output.outputs[0].finish_reason == "stop"


def test_what_is_no_grammar_is_refused_before_anything_runs(llm: LLM) -> None:
    with pytest.raises(InvalidRequestError, match="structured_outputs"):
        llm.generate(PROMPT, held_to(StructuredOutputsParams(regex="(")), use_tqdm=False)


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TandemStack]:
    log = tmp_path_factory.mktemp("stack") / "log"
    with TandemStack(log, "--disable-log-requests") as running:
        yield running


def test_json_schemas_through_prefill_and_decode(stack: TandemStack) -> None:
    """The first token, made by the prefill worker, obeys too."""
    client = openai.OpenAI(base_url=f"{stack.url}/v1", api_key="none")
    for name in ("everyday-0", "everyday-3", "array-9", "choice-4"):
        schema = SCHEMAS[name]
        stream = client.chat.completions.create(
            model=MODEL,
            messages=[{"role": "user", "content": f"{name}: {PROMPT}"}],
            response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": schema}},
            stream=True,
            seed=1,
            max_tokens=300,
        )
        text = "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)
        jsonschema.validate(json.loads(text), schema)


def test_vllms_older_names_through_prefill_and_decode(stack: TandemStack) -> None:
    client = openai.OpenAI(base_url=f"{stack.url}/v1", api_key="none")
    answer = client.completions.create(
        model=MODEL,
        prompt="Is the sky blue? ",
        max_tokens=16,
        n=3,
        extra_body={"guided_choice": ["yes", "no"]},
    )
    assert {choice.text for choice in answer.choices} <= {"yes", "no"}
    assert {choice.finish_reason for choice in answer.choices} == {"stop"}


CITY = {"type": "string", "pattern": "^[A-Z][a-z]{1,10}$"}
PARAMETERS = {
    "type": "object",
    "properties": {"city": CITY, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
TOOLS = [
    {"type": "function", "function": {"name": "get_weather", "parameters": PARAMETERS}},
    {"type": "function", "function": {"name": "get_time"}},
]
QUESTION = [{"role": "user", "content": "How is the weather in Paris?"}]


def test_a_named_tool_is_called_with_valid_arguments(stack: TandemStack) -> None:
    client = openai.OpenAI(base_url=f"{stack.url}/v1", api_key="none")
    choice = {"type": "function", "function": {"name": "write_letter"}}
    # So many steps that a slow reader, who gets several tokens at once, still gets several pieces.
    text = {"type": "string", "minLength": 150, "maxLength": 200}
    parameters = {
        "type": "object",
        "properties": {"text": text},
        "required": ["text"],
        "additionalProperties": False,
    }
    letter = {"name": "write_letter", "parameters": parameters}
    stream = client.chat.completions.create(
        model=MODEL,
        messages=QUESTION,
        tools=[*TOOLS, {"type": "function", "function": letter}],
        tool_choice=choice,
        stream=True,
        seed=3,
    )
    pieces = [
        piece
        for chunk in stream
        for piece in (chunk.choices[0].delta.tool_calls or [])
        if piece.function
    ]
    assert [piece.function.name for piece in pieces if piece.function.name] == ["write_letter"]
    assert len(pieces) > 2, "arguments are streamed"
    arguments = "".join(piece.function.arguments or "" for piece in pieces)
    jsonschema.validate(json.loads(arguments), parameters)


def test_a_required_call_is_made(stack: TandemStack) -> None:
    client = openai.OpenAI(base_url=f"{stack.url}/v1", api_key="none")
    answer = client.chat.completions.create(
        model=MODEL,
        messages=QUESTION,
        tools=[TOOLS[0]],
        tool_choice="required",
        parallel_tool_calls=False,
        seed=3,
    )
    [call] = answer.choices[0].message.tool_calls
    assert answer.choices[0].finish_reason == "tool_calls"
    assert call.function.name == "get_weather"
    jsonschema.validate(json.loads(call.function.arguments), PARAMETERS)


def test_of_all_tools_only_allowed_ones_are_called(stack: TandemStack) -> None:
    """The question is about the weather, but that isn't to be asked."""
    client = openai.OpenAI(base_url=f"{stack.url}/v1", api_key="none")
    nothing = {"type": "object", "properties": {}, "additionalProperties": False}
    time_tool = {"name": "get_time", "parameters": nothing}
    allowed = [{"type": "function", "function": {"name": "get_time"}}]
    for seed in range(3):
        answer = client.chat.completions.create(
            model=MODEL,
            messages=QUESTION,
            tools=[TOOLS[0], {"type": "function", "function": time_tool}],
            tool_choice={
                "type": "allowed_tools",
                "allowed_tools": {"mode": "required", "tools": allowed},
            },
            parallel_tool_calls=False,
            seed=seed,
        )
        [call] = answer.choices[0].message.tool_calls
        assert (call.function.name, json.loads(call.function.arguments)) == ("get_time", {})


def test_bad_words_allowed_tokens_and_truncated_prompts(
    stack: TandemStack, model_dir: Path
) -> None:
    client = openai.OpenAI(base_url=f"{stack.url}/v1", api_key="none")

    def ask(prompt: object, **extra: object) -> str:
        answer = client.completions.create(
            model=MODEL, prompt=prompt, temperature=0, max_tokens=24, extra_body=extra
        )
        return answer.choices[0].text

    free = ask("The capital of France is")
    word = free.split()[0].strip(".,")
    assert word in free
    assert word not in ask("The capital of France is", bad_words=[word])
    allowed = [Tokenizer.from_dir(model_dir).encode(digit)[0] for digit in "0123456789"]
    assert set(ask("One, two, three:", allowed_token_ids=allowed)) <= set("0123456789")
    tokens = list(range(1000, 1064))
    assert ask(tokens, truncate_prompt_tokens=20) == ask(tokens[-20:])


@pytest.mark.parametrize("stream", [False, True])
def test_a_grammar_that_fails_amid_the_output_is_the_clients_to_change(
    stack: TandemStack, *, stream: bool
) -> None:
    """Its first token, prefill's, is fine; decode finds too many ways to go on behind it."""
    choices = [f"x{number}" for number in range(20_000)]

    def ask(client: openai.OpenAI) -> None:
        answer = client.completions.create(
            model=MODEL,
            prompt="One of many: " * 20,
            stream=stream,
            extra_body={"guided_choice": choices},
        )
        for chunk in answer:
            assert chunk.choices[0].text in ("", "x")

    url = f"{stack.url}/v1"
    with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client:
        with pytest.raises(openai.APIError, match="`guided_choice` can't be followed") as failure:
            ask(client)
        assert failure.value.param == "guided_choice"
        after = client.completions.create(model=MODEL, prompt="Yes or no? ", max_tokens=4)
    assert after.choices[0].finish_reason in ("length", "stop")


def test_an_output_that_cannot_begin_is_refused_by_prefill(
    stack: TandemStack, model_dir: Path
) -> None:
    """Its blocks are on their way to decode by then; the same prompt is served afterwards."""
    allowed = Tokenizer.from_dir(model_dir).encode("right")
    with openai.OpenAI(base_url=f"{stack.url}/v1", api_key="none", max_retries=0) as client:

        def ask(**extra: object) -> str:
            prompt = "Left or right? " * 40
            answer = client.completions.create(model=MODEL, prompt=prompt, extra_body=extra)
            return answer.choices[0].text

        with pytest.raises(openai.BadRequestError, match="allow none") as failure:
            ask(guided_choice=["left"], allowed_token_ids=allowed)
        assert failure.value.param == "guided_choice"
        assert ask(guided_choice=["left"]) == "left"
