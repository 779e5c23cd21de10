"""The router is what its OpenAPI document says: schemathesis asks, with good data and bad.

Everything that schemathesis checks is on, but for one thing in the first test, which says why.
"""

import copy
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis import Case
from schemathesis.checks import CheckContext
from schemathesis.core.failures import Failure
from schemathesis.core.transport import Response
from schemathesis.specs.openapi.checks import positive_data_acceptance
from stack_thread import StackThread

from services.router.admin.status_api import VERSION
from services.router.openapi.document import openapi_document

KEY = "open-sesame"
HEADERS = {"Authorization": f"Bearer {KEY}"}
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"

# The same requests each time, so that a change fails by its own faults; `make fuzz` tries others.
FIXED = settings(derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
DOCUMENT = openapi_document(version=VERSION, has_keys=True)
api = schemathesis.openapi.from_dict(DOCUMENT)
# The key is ours to send, the check of it asks without; and what's not in a URL's query is ignored.
api.config.generation.update(with_security_parameters=False)
api.config.generation.allow_extra_parameters = False
# Its own 10 s are over soon where this whole process gets no core.
ANSWER_S = 120.0
api.config.update(request_timeout=ANSWER_S)


@pytest.fixture(scope="module")
def router(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StackThread]:
    path = tmp_path_factory.mktemp("router")
    with StackThread(path, api_keys=(KEY,), max_body_bytes=1 << 16) as running:
        yield running
        running.wait_idle()


@pytest.fixture(scope="module")
def session() -> Iterator[requests.Session]:
    with requests.Session() as session:
        yield session


def test_the_document_is_served(router: StackThread) -> None:
    assert httpx.get(f"{router.stack.url}/openapi.json").json() == DOCUMENT


def test_every_route_is_described(router: StackThread) -> None:
    served = {
        (method, route.path.replace(":path}", "}"))
        for route in router.stack.service.app.routes
        for method in route.methods - {"HEAD"}
    }
    described = {
        (method.upper(), path) for path, ops in DOCUMENT["paths"].items() for method in ops
    }
    assert served == described


def test_without_a_key_there_are_probes_only() -> None:
    """That the others want one is for schemathesis to check."""
    ops = [(path, op) for path, ops in DOCUMENT["paths"].items() for op in ops.values()]
    assert {path for path, op in ops if "security" not in op} == {
        *("/health", "/ping", "/version", "/load", "/metrics", "/openapi.json")
    }


@schemathesis.check
def refusal_names_the_field(ctx: CheckContext, response: Response, case: Case) -> None:
    """What is valid by the schema and still refused is refused for a field's value."""
    assert case.meta is not None
    if not case.meta.generation.mode.is_positive or response.status_code != 400:
        return
    error = response.json()["error"]
    # /v1/messages has no place for it but the message.
    if not error.get("param") and not error["message"].startswith("`"):
        raise Failure(operation=case.operation.label, title="No field named", message=response.text)


# Those change the server for all who follow.
ordinary = api.exclude(path="/load_config", method="POST").exclude(path="/abort")


@ordinary.parametrize()
@settings(FIXED, max_examples=60)
def test_the_router_does_as_described(
    case: Case, router: StackThread, session: requests.Session
) -> None:
    # A schema can't say that `stream_options` needs `stream`, that prompts fit into the context or
    # that a template takes the messages; so valid bodies may be refused here. `tame` has none such.
    case.call_and_validate(
        router.stack.url,
        session,
        HEADERS,
        excluded_checks=[positive_data_acceptance],
    )


def tame(document: dict[str, Any]) -> dict[str, Any]:
    """The two big endpoints alone, with those fields that depend on no other."""
    tamed = copy.deepcopy(document)
    tamed["paths"] = {path: tamed["paths"][path] for path in (CHAT, COMPLETIONS)}
    text = {"type": "string", "minLength": 1, "maxLength": 12}
    message = {
        "type": "object",
        "properties": {"role": {"enum": ["system", "user", "assistant"]}, "content": text},
        "required": ["role", "content"],
    }
    token_ids = {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 255}}
    token_ids |= {"minItems": 1, "maxItems": 20}
    some = {"minItems": 1, "maxItems": 3}
    own: dict[str, Any] = {
        "model": {"enum": ["toy", "alias"]},
        "messages": {"type": "array", "items": message} | some,
        "prompt": {"anyOf": [text, token_ids, {"type": "array", "items": text} | some]},
        "n": {"type": "integer", "minimum": 1, "maximum": 3},
        "max_tokens": {"type": "integer", "minimum": 1, "maximum": 8},
        "stop": {"type": "array", "items": text, "maxItems": 4},
        "stop_token_ids": token_ids,
    }
    kept = {"temperature", "top_p", "top_k", "min_p", "seed", "stream", "ignore_eos"}
    kept |= {"presence_penalty", "frequency_penalty", "repetition_penalty", "user", "logprobs"}
    kept |= {"return_token_ids", "return_tokens_as_token_ids", "skip_special_tokens"}
    for name in ("ChatBody", "CompletionBody"):
        body = tamed["components"]["schemas"][name]
        fields = body["properties"]
        body["properties"] = {
            field: own.get(field, schema)
            for field, schema in fields.items()
            if field in own | dict.fromkeys(kept)
        }
        body["required"] = [*body["required"], "max_tokens"]
        body["additionalProperties"] = False
    return tamed


tame_api = schemathesis.openapi.from_dict(tame(DOCUMENT))
tame_api.config.update(request_timeout=ANSWER_S)
tame_api.config.generation.update(modes=[schemathesis.GenerationMode.POSITIVE])


@tame_api.parametrize()
@settings(FIXED, max_examples=150)
def test_what_is_valid_is_answered(
    case: Case, router: StackThread, session: requests.Session
) -> None:
    case.body = with_integers(case.body)
    case.call_and_validate(router.stack.url, session, HEADERS)


def with_integers(value: Any) -> Any:
    """To JSON Schema 5.0 is an integer; to this server it's none, and a schema can't say so."""
    match value:
        case dict():
            return {name: with_integers(inner) for name, inner in value.items()}
        case list():
            return [with_integers(inner) for inner in value]
        case float() if value.is_integer():
            return int(value)
        case _:
            return value
