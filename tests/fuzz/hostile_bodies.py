"""Request bodies: good ones of every endpoint, and what makes them bad."""

import copy
import json
import random
from collections.abc import Callable
from typing import Any

from services.router.openapi.operations import OPERATIONS

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
RESPONSES, MESSAGES = "/v1/responses", "/v1/messages"
STREAMS = (CHAT, COMPLETIONS, RESPONSES, MESSAGES)

USER = [{"role": "user", "content": "héllo 👩‍💻"}]
WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {"type": "object", "properties": {"city": {"$ref": "#/$defs/city"}}}
        | {"$defs": {"city": {"type": "string", "maxLength": 9}}},
    },
}
PERSON = {"type": "object", "properties": {"age": {"type": "integer"}}, "required": ["age"]}
SCHEMA = WEATHER["function"]["parameters"]
FUNCTION = {"type": "function", "name": "weather", "parameters": SCHEMA}
BATCH = {"input_file_id": "file-x", "endpoint": CHAT, "completion_window": "24h"}
TOOL = {"name": "weather", "input_schema": SCHEMA}
ITEMS = [
    {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "a"}]},
    {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
    {"type": "function_call_output", "call_id": "c", "output": "b"},
]


def _schema(schema: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}


# Path and body; a new endpoint gets a line.
GOOD: list[tuple[str, dict[str, Any]]] = [
    (CHAT, {"model": "toy", "messages": USER, "max_tokens": 5}),
    (CHAT, {"messages": USER, "max_tokens": 5, "logprobs": True, "top_logprobs": 2, "n": 2}),
    (CHAT, {"messages": USER, "tools": [WEATHER], "tool_choice": "required", "max_tokens": 4}),
    (CHAT, {"messages": USER, "response_format": _schema(PERSON), "max_tokens": 4}),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}]}),
    (CHAT, {"messages": USER, "chat_template_kwargs": {"a": 1}, "documents": [{"text": "b"}]}),
    (COMPLETIONS, {"prompt": "hello", "max_tokens": 5, "logit_bias": {"5": 1}, "seed": 3}),
    (COMPLETIONS, {"prompt": ["a", "b"], "n": 2, "stop": ["zz", "b"], "echo": True}),
    (COMPLETIONS, {"prompt": [[65, 66], [67]], "logprobs": 2, "max_tokens": 3}),
    (COMPLETIONS, {"prompt": [65, 66], "stop_token_ids": [4], "allowed_token_ids": [65]}),
    (COMPLETIONS, {"prompt": "a", "structured_outputs": {"regex": "[a-z]{3}"}, "max_tokens": 3}),
    (COMPLETIONS, {"prompt": "a", "guided_choice": ["yes", "no"], "bad_words": ["x"]}),
    (COMPLETIONS, {"prompt": "a", "guided_grammar": 'root ::= "a" | "b"', "max_tokens": 2}),
    (COMPLETIONS, {"prompt": "abcdef", "truncate_prompt_tokens": 3, "max_tokens": 2}),
    (COMPLETIONS, {"prompt": "abc", "echo": True, "logprobs": 1, "max_tokens": 0}),
    (COMPLETIONS, {"prompt": "abc", "prompt_logprobs": 2, "best_of": 2, "max_tokens": 2}),
    (RESPONSES, {"input": "hello", "max_output_tokens": 16, "store": False}),
    (
        RESPONSES,
        {"input": ITEMS, "instructions": "b", "max_output_tokens": 20, "truncation": "auto"},
    ),
    (RESPONSES, {"input": "a", "previous_response_id": "resp_x", "metadata": {"a": "b"}}),
    (RESPONSES, {"input": "a", "background": True, "max_output_tokens": 4}),
    (RESPONSES, {"input": "a", "tools": [FUNCTION], "tool_choice": "required"}),
    (MESSAGES, {"messages": USER, "max_tokens": 5, "system": "b", "stop_sequences": ["zz"]}),
    (
        MESSAGES,
        {"messages": USER, "max_tokens": 5, "tools": [TOOL], "tool_choice": {"type": "any"}},
    ),
    (f"{MESSAGES}/count_tokens", {"messages": USER, "system": [{"type": "text", "text": "b"}]}),
    ("/v1/embeddings", {"input": ["a", "b"], "encoding_format": "base64", "dimensions": 8}),
    ("/v1/embeddings", {"input": [[65, 66], [67]], "normalize": False}),
    ("/v1/score", {"text_1": "a", "text_2": ["b", "c"], "truncate_prompt_tokens": 2}),
    ("/v2/rerank", {"query": "a", "documents": ["b", {"text": "c"}], "top_n": 1}),
    ("/v1/batches", BATCH),
    ("/tokenize", {"prompt": "hello", "return_token_strs": True}),
    ("/tokenize", {"messages": USER, "add_generation_prompt": False}),
    ("/detokenize", {"tokens": [65, 66, 67]}),
]

_BODIES = {op.path: op.body for op in OPERATIONS if isinstance(op.body, type)}
FIELDS = {path: body.__struct_fields__ for path, body in _BODIES.items()}

# Written as they are, since no JSON library would.
_RAW = [
    *("NaN", "Infinity", "-Infinity", "1e999", "-1e999", "-0", "0.0", "1e-999", "1E400", "1.0"),
    *("9" * 25, "-" + "9" * 25, "9" * 5000, "1" + "0" * 400 + ".5", "18446744073709551616"),
    *('"\\ud800"', '"\\udfff\\ud800"', '"\\u0000"', '"\\uffff"', '"\\x"', '"\t"', "'a'"),
    *('{"a":1,"a":2}', '{"":{}}', "[[],[]]", "{", "]", "nul", "tru", "01", "+1", ".5", "0x1f"),
    *('{"\\ud800":NaN}', '{"\\ud800":1}', "[1,]", '{"a":1,}', "//", "\ufeff", "\u2028"),
]

SCHEMAS: list[Any] = [
    *({"$ref": "#"}, {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}, {"$ref": 5}),
    {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}},
    *({"$ref": "http://example.com/x"}, {"$ref": "#/no/where"}, {"$ref": "file:///etc/passwd"}),
    *({"allOf": [{"$ref": "#"}]}, {"anyOf": []}, {"allOf": []}, {"oneOf": "x"}, {"not": {}}),
    {"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]},
    *({"type": "array", "items": {"$ref": "#"}, "minItems": 1}, {"enum": []}, {"enum": [{}]}),
    *({"type": "nonsense"}, {"type": []}, {"type": {}}, {"properties": []}, {"required": "a"}),
    *({"minimum": 5, "maximum": 1, "type": "integer"}, {"type": "integer", "multipleOf": 0}),
    *({"type": "string", "maxLength": -1}, {"type": "string", "minLength": 10**9}),
    *({"type": "array", "minItems": 10**9}, {"type": "integer", "minimum": 1e308}),
    *({"type": "string", "pattern": "("}, {"type": "string", "pattern": "(a+)+$"}),
    *({"type": "string", "format": "no-such"}, {"$defs": []}, {"definitions": 5, "$ref": "#"}),
    *({"type": "object", "patternProperties": {"(": {}}}, {"const": None}, {}, {"x": 1}),
    *({"type": "object", "properties": {str(i): {} for i in range(500)}}, {"if": {"$ref": "#"}}),
]
REGEXES = [
    *("(", "[", "*", "a**", "(?=a)b", "(?P<x>a)(?P=x)", "\\1", "(a+)+$", "(a|a)*b", "\\", "", "."),
    *("(" * 500 + "a" + ")" * 500, "a{1000000}", "(a{1000}){1000}", "((a{100}){100}){100}"),
    *("[^\\x00-\\U0010ffff]", "\\p{Nope}", "(?i)straße", "x{5,2}", "a" * 5000, "(a?){64}a{64}"),
    *("(?:a|b|ab)*c", ".*.*.*.*.*.*.*.*x", "[\\w-a]", "\ud7ff", "^$^$", "\\b\\B", "(?#", "a{,}"),
]
GRAMMARS = [
    *("root ::= root", "root ::= root root | root", "root ::=", "::=", "start: start", "start: A"),
    *('root ::= "a', "start: /(/", "start: %json {", 'start: %json {"$ref":"#"}', "\x00", "%"),
    *("root ::= [", "root ::= (" * 300, "start: " + "a " * 3000, "start: @x", "%llguidance {}"),
    *("start: /a{100000}/", 'root ::= "a"{1000000}', "start: a\na: b\nb: a", "start[x: y]: 5"),
]


def _nested(depth: int, rng: random.Random) -> str:
    opening, closing = rng.choice([("[", "]"), ('{"a":', "}"), ('{"anyOf":[', "]}")])
    inner = rng.choice(["", "1", "NaN"]) if opening == "[" else "1"
    return opening * depth + inner + closing * rng.choice([depth, depth - 1])


def _any_value(rng: random.Random) -> Any:
    """Of any type; strings in `\\0…\\0` are JSON text."""
    value = rng.choice(
        [
            *(None, True, False, 0, 1, -1, 1.5, "", "a", [], {}, [None], [[]], {"": ""}, "\x00"),
            *(2**31, 2**63, 2**64, -(2**63), 1e308, 5e-324, "a" * 3000, ["a"] * 3000),
            *([0] * 3000, {str(i): i for i in range(1500)}, "日本語" * 400, "\u202e", "👩‍💻"),
            *({"type": "function"}, {"function": {"name": "x"}}, {"schema": {}}, "token_id:1"),
            *(rng.choice(SCHEMAS), _schema(rng.choice(SCHEMAS)), rng.choice(REGEXES)),
            "\0" + rng.choice(_RAW) + "\0",
            "\0" + _nested(rng.choice([20, 120, 500, 1100, 5000, 20000]), rng) + "\0",
        ]
    )
    return copy.deepcopy(value)


def _places(value: Any) -> list[tuple[Any, Any]]:
    """Containers and keys of everything inside."""
    items: list[tuple[Any, Any]] = []
    if isinstance(value, dict):
        items = list(value.items())
    elif isinstance(value, list):
        items = list(enumerate(value))
    return [(value, key) for key, _ in items] + [p for _, inner in items for p in _places(inner)]


def _replace(path: str, body: dict[str, Any], rng: random.Random) -> None:
    container, key = rng.choice(_places(body))
    container[key] = _any_value(rng)


def _remove(path: str, body: dict[str, Any], rng: random.Random) -> None:
    container, key = rng.choice(_places(body))
    del container[key]


def _add(path: str, body: dict[str, Any], rng: random.Random) -> None:
    body[rng.choice(FIELDS[path])] = _any_value(rng)


def _rename(path: str, body: dict[str, Any], rng: random.Random) -> None:
    dicts = [body, *(c[k] for c, k in _places(body) if isinstance(c[k], dict))]
    container = rng.choice(dicts)
    container[rng.choice(["", "$ref", "\0" + '"\\ud800"' + "\0", "a" * 500, "日"])] = _any_value(
        rng
    )


def _constrain(path: str, body: dict[str, Any], rng: random.Random) -> None:
    name, value = rng.choice(
        [
            ("response_format", _schema(rng.choice(SCHEMAS))),
            ("guided_json", rng.choice([*SCHEMAS, json.dumps(rng.choice(SCHEMAS))])),
            ("guided_regex", rng.choice(REGEXES)),
            ("guided_grammar", rng.choice(GRAMMARS)),
            ("guided_choice", rng.choice([[""], [], ["a"] * 2000, ['a\n"\\'], ["\x00"], [1]])),
            ("structured_outputs", {"json": rng.choice(SCHEMAS)}),
            ("structured_outputs", {"regex": rng.choice(REGEXES), "grammar": "x"}),
            ("tools", [{"function": {"name": "f", "parameters": rng.choice(SCHEMAS)}}] * 2),
            ("tools", [{"function": {"name": "f", "parameters": rng.choice(SCHEMAS)}}]),
        ]
    )
    body[name] = copy.deepcopy(value)
    if name == "tools":
        body["tool_choice"] = rng.choice(["required", {"function": {"name": "f"}}])


_CHANGES: list[Callable[[str, dict[str, Any], random.Random], None]] = [
    *(_replace, _replace, _replace, _remove, _add, _add, _rename, _constrain),
]


def good_body(rng: random.Random) -> tuple[str, dict[str, Any]]:
    path, body = rng.choice(GOOD)
    body = json.loads(json.dumps(body))
    if path in STREAMS and rng.random() < 0.4:
        body["stream"] = True
    return path, body


def hostile_body(rng: random.Random) -> tuple[str, bytes]:
    """Path and body of a request with one to three things wrong, or strange."""
    path, body = good_body(rng)
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        if _places(body):
            rng.choice(_CHANGES)(path, body, rng)
    return path, json_text(body)


def json_text(body: Any) -> bytes:
    """With strings in `\\0…\\0` as the JSON text that they hold."""
    if isinstance(body, str) and len(body) > 1 and body[0] == body[-1] == "\0":
        return body[1:-1].encode("utf-8", "surrogatepass")
    if isinstance(body, dict):
        pairs = (json_text(key) + b":" + json_text(value) for key, value in body.items())
        return b"{" + b",".join(pairs) + b"}"
    if isinstance(body, list):
        return b"[" + b",".join(map(json_text, body)) + b"]"
    return json.dumps(body, ensure_ascii=False).encode("utf-8", "surrogatepass")
