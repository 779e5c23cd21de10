"""What of JSON Schema a library follows to the letter; it would silently ignore the rest.

A schema that asks for more is refused, so that an output never disobeys. What is left is put in
the one form that all of them read alike: formats become patterns, and every node says its type.
"""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from engine.grammar.json_formats import FORMATS

MAX_DEPTH = 64
_ESCAPED = re.compile(r'["\\\x00-\x1f]')

Json = Any
Node = dict[str, Json]

# Keywords that say something about values of one type; integers are numbers.
_ABOUT: dict[str, frozenset[str]] = {
    "string": frozenset({"minLength", "maxLength", "pattern", "format"}),
    "number": frozenset(
        {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"}
    ),
    "array": frozenset(
        {"items", "prefixItems", "additionalItems", "unevaluatedItems", "minItems", "maxItems"}
        | {"uniqueItems", "contains", "minContains", "maxContains"}
    ),
    "object": frozenset(
        {"properties", "required", "additionalProperties", "unevaluatedProperties"}
        | {"patternProperties", "propertyNames", "minProperties", "maxProperties"}
        | {"dependentRequired", "dependentSchemas", "dependencies"}
    ),
}
_ABOUT["integer"] = _ABOUT["number"]
_TYPED = frozenset().union(*_ABOUT.values())
_COMPLETE = ("$ref", "const", "enum", "anyOf", "oneOf", "allOf")  # each a node's only assertion
_NEVER = ("not", "if", "then", "else", "$dynamicRef", "$recursiveRef")
_NODES_BY_NAME = ("properties", "patternProperties", "$defs", "definitions")
_NODES_IN_ORDER = ("prefixItems", "anyOf", "oneOf", "allOf")
_ONE_NODE = ("items", "additionalProperties", "propertyNames")
_TYPE_OF: dict[type, str] = {
    str: "string",
    int: "integer",
    bool: "boolean",
    list: "array",
    dict: "object",
    type(None): "null",
}
_SHAPES: dict[type, tuple[str, ...]] = {
    str: ("$ref", "pattern", "format"),
    list: ("enum", "anyOf", "oneOf", "allOf", "prefixItems", "required"),
    dict: ("properties", "patternProperties", "$defs", "definitions"),
}


@dataclass(frozen=True, slots=True)
class JsonRules:
    """`followed` are keywords by type; `check_pattern` raises ValueError for a pattern that the
    library would misread inside a JSON string; `escapes_names` says whether it writes any name of
    a property as JSON does."""

    library: str
    followed: Mapping[str, frozenset[str]]
    check_pattern: Callable[[str], None]
    escapes_names: bool = True

    def exact(self, schema: str | Node) -> str:
        """The schema, as JSON text, in the form that the library follows to the letter.

        Raises ValueError for one that it doesn't.
        """
        try:
            root = json.loads(schema) if isinstance(schema, str) else schema
            return json.dumps(_Reader(self, root).node(root, 0))
        except RecursionError as error:
            raise ValueError("it is nested too deeply") from error


class _Reader:
    def __init__(self, rules: JsonRules, root: Json) -> None:
        self._rules = rules
        self._root = root

    def node(self, node: Json, depth: int) -> Json:
        if depth > MAX_DEPTH:
            raise ValueError(f"it is nested more than {MAX_DEPTH} deep")
        if isinstance(node, bool):
            return node
        if not isinstance(node, dict):
            raise ValueError(f"{json.dumps(node)[:40]} is no schema")
        for keyword in _NEVER:
            if keyword in node:
                raise self._ignored(f"`{keyword}`")
        for shape, keywords in _SHAPES.items():
            for keyword in keywords:
                if keyword in node and not isinstance(node[keyword], shape):
                    raise ValueError(f"`{keyword}` must be of JSON type {_TYPE_OF[shape]}")
        complete = [keyword for keyword in _COMPLETE if keyword in node]
        if complete:
            self._check_complete(node, complete)
            read = {complete[0]: node[complete[0]]}
        else:
            read = self._typed(node)
        read |= {name: node[name] for name in ("$defs", "definitions") if name in node}
        return self._with_children(read, depth + 1)

    def _check_complete(self, node: Node, complete: list[str]) -> None:
        keyword = complete[0]
        beside = [name for name in node if name in _TYPED or name in complete[1:]]
        values = [node["const"]] if keyword == "const" else node[keyword]
        if keyword in ("const", "enum") and "type" in node:
            types = _types(node)
            allowed = {*types, "integer"} if "number" in types else set(types)
            if any(_type_of(value) not in allowed for value in values):
                beside.append("type")
        elif "type" in node:
            beside.append("type")
        if beside:
            raise self._ignored(f"`{beside[0]}` beside `{keyword}`")
        if keyword == "$ref":
            self._check_reference(values)
        elif not values:
            raise ValueError(f"`{keyword}` is empty")
        elif keyword == "allOf" and len(values) > 1:
            raise self._ignored("`allOf` of several")
        elif keyword == "oneOf" and not _are_exclusive(values):
            raise self._ignored("`oneOf` of values that may be alike")

    def _check_reference(self, reference: Json) -> None:
        match str(reference).split("/"):
            case ["#"]:
                return
            case ["#", ("$defs" | "definitions") as group, name]:
                if isinstance(self._root.get(group), dict) and name in self._root[group]:
                    return
        raise ValueError(f"`$ref` {json.dumps(reference)[:80]} names none of the schema's `$defs`")

    def _typed(self, node: Node) -> Node:
        said = [keyword for keyword in node if keyword in _TYPED]
        if "type" not in node:
            if not said:
                return {}
            kinds = [kind for kind in ("object", "array") if _ABOUT[kind].issuperset(said)]
            if not kinds:
                raise self._ignored(f"`{said[0]}` without a `type`")
            types = kinds
        else:
            types = _types(node)
        read: Node = {"type": types[0] if len(types) == 1 else types}
        for kind in types:
            for keyword in said:
                if keyword in _ABOUT.get(kind, ()):
                    if keyword not in self._rules.followed.get(kind, ()):
                        raise self._ignored(f"`{keyword}` of type {kind}")
                    read[keyword] = node[keyword]
        self._read_string(read)
        properties = read.get("properties", {})
        if any(name not in properties for name in read.get("required", [])):
            raise self._ignored("`required` of what isn't among the `properties`")
        if not self._rules.escapes_names and any(map(_ESCAPED.search, properties)):
            raise self._ignored("`properties` with quotes, backslashes or control characters")
        return read

    def _read_string(self, read: Node) -> None:
        pattern, name = read.get("pattern"), read.pop("format", None)
        if name is not None:
            if name not in FORMATS:
                raise self._ignored(f"`format` {json.dumps(name)[:40]}")
            if pattern is not None:
                raise self._ignored("`pattern` beside `format`")
            read["pattern"] = FORMATS[name]
        elif pattern is not None:
            self._rules.check_pattern(pattern)
            read["pattern"] = f"^(?:{pattern.removeprefix('^').removesuffix('$')})$"
        if "pattern" in read and not read.keys().isdisjoint(("minLength", "maxLength")):
            raise self._ignored("a length beside `pattern` or `format`")

    def _with_children(self, read: Node, depth: int) -> Node:
        for keyword in _NODES_BY_NAME:
            if keyword in read:
                read[keyword] = {
                    name: self.node(child, depth) for name, child in read[keyword].items()
                }
        for keyword in _NODES_IN_ORDER:
            if keyword in read:
                read[keyword] = [self.node(child, depth) for child in read[keyword]]
        for keyword in _ONE_NODE:
            if keyword in read:
                read[keyword] = self.node(read[keyword], depth)
        return read

    def _ignored(self, what: str) -> ValueError:
        return ValueError(f"{self._rules.library} doesn't follow {what}")


def _types(node: Node) -> list[str]:
    types = node["type"] if isinstance(node["type"], list) else [node["type"]]
    if not types:
        raise ValueError("`type` is empty")
    for name in types:
        if name not in (*_ABOUT, "boolean", "null"):
            raise ValueError(f"there is no type {json.dumps(name)[:40]}")
    return types


def _type_of(value: Json) -> str:
    if isinstance(value, float):
        return "integer" if value.is_integer() else "number"
    return _TYPE_OF[type(value)]


def _are_exclusive(nodes: list[Json]) -> bool:
    """Whether no value can obey two of these."""
    if not all(isinstance(node, dict) for node in nodes):
        return False
    if all("const" in node for node in nodes):
        return len({json.dumps(node["const"]) for node in nodes}) == len(nodes)
    types = [node.get("type") for node in nodes]
    if not all(isinstance(name, str) for name in types):
        return False
    return len({"number" if name == "integer" else name for name in types}) == len(types)
