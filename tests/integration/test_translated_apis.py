"""/v1/responses and /v1/messages say what a chat says, on real processes with a real model."""

import json
from collections.abc import Iterator

import jsonschema
import pytest
from anthropic import Anthropic
from openai import OpenAI
from tandem_stack import MODEL, TandemStack

QUESTION = "What is the capital of France?"
AND_NOW = "And of Italy?"
NUM_TOKENS = 24
PARAMETERS = {
    "type": "object",
    "properties": {"city": {"type": "string", "pattern": "^[A-Z][a-z]{1,10}$"}},
    "required": ["city"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TandemStack]:
    log = tmp_path_factory.mktemp("stack") / "log"
    # Two routers, so that a conversation goes on at one that hasn't seen its beginning.
    with TandemStack(log, "--routers", "2", "--disable-log-requests") as running:
        yield running


@pytest.fixture(scope="module")
def client(stack: TandemStack) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{stack.url}/v1", api_key="none") as client:
        yield client


@pytest.fixture(scope="module")
def chats(client: OpenAI) -> tuple[str, str]:
    """Greedy answers to both questions, one after the other."""
    messages = [{"role": "user", "content": QUESTION}]
    texts: list[str] = []
    for _ in range(2):
        answer = client.chat.completions.create(
            model=MODEL, messages=messages, max_tokens=NUM_TOKENS, temperature=0
        )
        texts.append(answer.choices[0].message.content)
        messages += [
            {"role": "assistant", "content": texts[-1]},
            {"role": "user", "content": AND_NOW},
        ]
    return texts[0], texts[1]


def test_a_conversation_by_ids_is_a_chats(stack: TandemStack, chats: tuple[str, str]) -> None:
    options = {"model": MODEL, "max_output_tokens": NUM_TOKENS, "temperature": 0}
    for _ in range(4):
        # Each client has a connection of its own, which either router may take.
        with OpenAI(base_url=f"{stack.url}/v1", api_key="none") as first_client:
            first = first_client.responses.create(input=QUESTION, **options)
        with (
            OpenAI(base_url=f"{stack.url}/v1", api_key="none") as second_client,
            second_client.responses.stream(
                input=AND_NOW, previous_response_id=first.id, **options
            ) as stream,
        ):
            texts = [event.delta for event in stream if event.type == "response.output_text.delta"]
            second = stream.get_final_response()
        assert (first.output_text, second.output_text) == chats
        assert "".join(texts) == second.output_text


def test_messages_are_a_chats(stack: TandemStack, chats: tuple[str, str]) -> None:
    turns = [
        {"role": "user", "content": QUESTION},
        {"role": "assistant", "content": chats[0]},
        {"role": "user", "content": [{"type": "text", "text": AND_NOW}]},
    ]
    options = {"model": MODEL, "max_tokens": NUM_TOKENS, "extra_body": {"temperature": 0}}
    with Anthropic(base_url=stack.url, api_key="none") as client:
        with client.messages.stream(messages=turns, **options) as stream:
            final = stream.get_final_message()
        counted = client.messages.count_tokens(model=MODEL, messages=turns)
    assert final.content[0].text == chats[1]
    usage = final.usage
    assert usage.input_tokens + usage.cache_read_input_tokens == counted.input_tokens


def test_forced_calls_fit_their_schema(stack: TandemStack, client: OpenAI) -> None:
    response = client.responses.create(
        model=MODEL,
        input=QUESTION,
        tools=[{"type": "function", "name": "look_up", "parameters": PARAMETERS, "strict": True}],
        tool_choice="required",
    )
    call = response.output[0]
    assert call.type == "function_call"
    jsonschema.validate(json.loads(call.arguments), PARAMETERS)
    with (
        Anthropic(base_url=stack.url, api_key="none") as anthropic,
        anthropic.messages.stream(
            model=MODEL,
            messages=[{"role": "user", "content": QUESTION}],
            max_tokens=100,
            tools=[{"name": "look_up", "input_schema": PARAMETERS}],
            tool_choice={"type": "tool", "name": "look_up"},
        ) as stream,
    ):
        message = stream.get_final_message()
    assert message.stop_reason == "tool_use"
    jsonschema.validate(message.content[0].input, PARAMETERS)
