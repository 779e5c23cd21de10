"""JSON Schemas of every kind, all of them bounded, so that any output comes to its end."""

from typing import Any

Schema = dict[str, Any]

STRING: Schema = {"type": "string", "maxLength": 12}
INTEGER: Schema = {"type": "integer", "minimum": -1000, "maximum": 1000}
BOOLEAN: Schema = {"type": "boolean"}
NULL: Schema = {"type": "null"}
SCALARS = [STRING, INTEGER, BOOLEAN, NULL]


def closed(properties: dict[str, Schema], required: list[str] | None = None) -> Schema:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties) if required is None else required,
        "additionalProperties": False,
    }


def array(items: Schema, low: int, high: int) -> Schema:
    return {"type": "array", "items": items, "minItems": low, "maxItems": high}


def _strings() -> list[Schema]:
    lengths = [(0, 1), (1, 1), (3, 3), (2, 5), (5, 20)]
    patterns = [
        "^[a-z]{3}$",
        "^[0-9]{4}-[0-9]{2}$",
        "^(yes|no)$",
        "^[A-Z][a-z]{1,8}$",
        "^a?b{2,3}$",
    ]
    formats = ["date", "date-time", "uuid", "ipv4"]
    return [
        *({"type": "string", "minLength": low, "maxLength": high} for low, high in lengths),
        *({"type": "string", "pattern": pattern} for pattern in patterns),
        *({"type": "string", "format": name} for name in formats),
    ]


def _numbers() -> list[Schema]:
    bounds = [(0, 0), (0, 9), (-5, 5), (10, 99), (-100, -1), (1, 1_000_000)]
    return [
        *({"type": "integer", "minimum": low, "maximum": high} for low, high in bounds),
        {"type": "integer", "exclusiveMinimum": 0, "exclusiveMaximum": 3},
        {"type": "integer", "minimum": 0, "maximum": 100, "multipleOf": 5},
    ]


def _choices() -> list[Schema]:
    return [
        {"const": "fixed"},
        {"const": 42},
        {"const": None},
        {"const": {"a": [1, "two", False]}},
        {"enum": ["red", "green", "blue"]},
        {"enum": [1, 2, 3]},
        {"enum": ["a", 1, None, True]},
        {"enum": ["ünï", "日本", "🙂", 'quo"te', "back\\slash", "new\nline"]},
        {"type": ["boolean", "null"]},
        {"anyOf": [INTEGER, {"type": "string", "pattern": "^[a-c]{2}$"}]},
        {"oneOf": [{"const": "x"}, {"const": "y"}]},
        {
            "anyOf": [
                closed({"kind": {"const": "cat"}, "lives": INTEGER}),
                closed({"kind": {"const": "dog"}}),
            ]
        },
    ]


def _arrays() -> list[Schema]:
    sizes = [(0, 0), (0, 1), (1, 3), (2, 2), (4, 6)]
    return [
        *(array(BOOLEAN, low, high) for low, high in sizes),
        *(array(scalar, 1, 3) for scalar in SCALARS),
        array(array(INTEGER, 1, 2), 1, 2),
        array(closed({"id": INTEGER}), 1, 3),
        array({"enum": ["a", "b"]}, 0, 4),
        {"type": "array", "prefixItems": [STRING, INTEGER], "items": False, "minItems": 2},
        {"type": "array", "prefixItems": [BOOLEAN], "items": NULL, "minItems": 1, "maxItems": 3},
    ]


def _objects() -> list[Schema]:
    names = ["name", "with space", "ключ", "$dollar", "a.b", 'quo"te']
    return [
        closed({}),
        *(closed({name: BOOLEAN}) for name in names),
        *(closed({"value": scalar}) for scalar in SCALARS),
        *(closed({f"field_{i}": SCALARS[i % 4] for i in range(size)}) for size in (2, 3, 5, 8)),
        closed({"a": INTEGER, "b": BOOLEAN}, required=[]),
        closed({"a": INTEGER, "b": BOOLEAN, "c": NULL}, required=["b"]),
        closed({"outer": closed({"inner": closed({"leaf": INTEGER})})}),
        closed({"tags": array(STRING, 0, 3), "active": BOOLEAN}),
        closed({"point": array(INTEGER, 2, 2), "label": {"enum": ["p", "q"]}}),
        closed({"maybe": {"anyOf": [NULL, closed({"x": INTEGER})]}}),
        closed({"rows": array(closed({"id": INTEGER, "ok": BOOLEAN}), 1, 3)}),
    ]


def _references() -> list[Schema]:
    point = closed({"x": INTEGER, "y": INTEGER})
    return [
        {"$defs": {"point": point}, **closed({"at": {"$ref": "#/$defs/point"}})},
        {"$defs": {"point": point}, "$ref": "#/$defs/point"},
        {
            "definitions": {"color": {"enum": ["r", "g"]}},
            **array({"$ref": "#/definitions/color"}, 1, 2),
        },
        {
            "$defs": {"a": {"$ref": "#/$defs/b"}, "b": BOOLEAN},
            **closed({"v": {"$ref": "#/$defs/a"}}),
        },
        {"allOf": [{"type": "integer", "minimum": 3}, {"type": "integer", "maximum": 5}]},
    ]


def _number(low: int, high: int) -> Schema:
    return {"type": "integer", "minimum": low, "maximum": high}


def _pattern(pattern: str) -> Schema:
    return {"type": "string", "pattern": pattern}


def _everyday() -> list[Schema]:
    """What clients ask for."""
    sentiment = {"enum": ["positive", "neutral", "negative"]}
    weather = closed({"location": STRING, "unit": {"enum": ["C", "F"]}})
    item = closed({"sku": _pattern("^[A-Z]{2}-[0-9]{3}$"), "quantity": _number(1, 99)})
    email = _pattern("^[a-z]{1,10}@[a-z]{1,10}\\.com$")
    return [
        closed({"city": STRING, "country": STRING, "population": _number(0, 40_000_000)}),
        closed({"sentiment": sentiment, "score": _number(0, 100)}),
        closed({"name": STRING, "age": _number(0, 130), "email": email}),
        closed({"tool": {"const": "get_weather"}, "arguments": weather}),
        closed(
            {
                "steps": array(closed({"explanation": STRING, "output": STRING}), 1, 2),
                "final_answer": STRING,
            }
        ),
        closed({"items": array(item, 1, 2)}),
        closed({"date": {"type": "string", "format": "date"}, "total": _number(0, 9999)}),
        closed({"answer": {"enum": ["A", "B", "C", "D"]}}),
    ]


_KINDS = {
    "string": _strings(),
    "number": _numbers(),
    "choice": _choices(),
    "array": _arrays(),
    "object": _objects(),
    "reference": _references(),
    "everyday": _everyday(),
}
# Each once more inside an object, where separators and closing brackets follow it.
SCHEMAS: dict[str, Schema] = {
    f"{kind}-{i}": schema for kind, schemas in _KINDS.items() for i, schema in enumerate(schemas)
}
SCHEMAS |= {
    f"nested-{name}": closed({"first": schema, "then": BOOLEAN})
    for name, schema in SCHEMAS.items()
    if not name.startswith(("reference", "everyday"))
}
