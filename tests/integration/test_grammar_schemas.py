"""Outputs taken from the masks alone, at random: each is valid, or its schema is refused."""

import json
import random
from collections.abc import Iterator

import jsonschema
import numpy as np
import pytest
from schema_suite import SCHEMAS, array, closed

from engine.grammar import GrammarChecker, GrammarCompiler, make_checker, make_compiler
from engine.tokenizer import Tokenizer
from engine.weights.model_dir import resolve_model
from protocol.structured_outputs import StructuredOutputsParams

EOS, VOCAB_SIZE = 2, 49152
NUM_OUTPUTS, MAX_TOKENS = 2, 300
BACKENDS = ("llguidance", "xgrammar", "outlines")
# At least so many of the suite must be followed.
NUM_FOLLOWED = {"llguidance": len(SCHEMAS), "xgrammar": 150, "outlines": 90}

DIGIT = {"type": "integer", "minimum": 0, "maximum": 9}
NULL = {"type": "null"}


def text(**keywords: object) -> dict[str, object]:
    return {"type": "string", **keywords}


# What a library may ignore, misread or write wrongly.
TRICKY = {
    "contains": array(DIGIT, 1, 3) | {"contains": {"const": 7}},
    "unique": array(DIGIT, 3, 4) | {"uniqueItems": True},
    "multiple": {"type": "number", "multipleOf": 0.5, "minimum": 0, "maximum": 9},
    "not": {**DIGIT, "not": {"enum": [0, 1, 2, 3, 4, 5, 6, 7]}},
    "one-of": {"oneOf": [DIGIT, {"type": "integer", "minimum": 5, "maximum": 30}]},
    "all-of": {"allOf": [{"type": "object", "required": ["a"]}, {"required": ["b"]}]},
    "if": closed({"a": {"type": "boolean"}, "b": NULL}, ["a"])
    | {"if": {"properties": {"a": {"const": True}}}, "then": {"required": ["b"]}},
    "beside-ref": {"$ref": "#/$defs/s", "maxLength": 2, "$defs": {"s": text(maxLength=9)}},
    "beside-any-of": {"type": "integer", "minimum": 2, "anyOf": [{"maximum": 4}]},
    "enum-of-type": text(enum=["a", 1]),
    "untyped": {"maxLength": 3},
    "required-unknown": {"type": "object", "required": ["zz"], "additionalProperties": NULL},
    "min-properties": {"type": "object", "additionalProperties": NULL, "minProperties": 2},
    "names": {"type": "object", "propertyNames": text(pattern="^x$"), "maxProperties": 1},
    "dependent": closed({"a": NULL, "b": NULL}, []) | {"dependentRequired": {"a": ["b"]}},
    "pattern-dot": text(pattern="^.{3}$"),
    "pattern-negated": text(pattern="^[^a]{2}$"),
    "pattern-quote": text(pattern='^"a"$'),
    "pattern-backslash": text(pattern=r"^\\a$"),
    "pattern-alternatives": text(pattern="^a|b$"),
    "pattern-optional": text(pattern=r"^[0-9](\.[0-9]{1,3})?Z$"),
    "pattern-and-length": text(pattern="^[a-z]*$", minLength=3, maxLength=5),
    "control-characters": text(minLength=3, maxLength=4),
    "date": text(format="date"),
    "email": text(format="email"),
    "ipv4": text(format="ipv4"),
    "property-quote": closed({'quo"te': NULL}),
}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_dir(resolve_model(None, progress=False))


@pytest.fixture(scope="module")
def closers(tokenizer: Tokenizer) -> np.ndarray:
    """Whether a token is all of what brings JSON to its end."""
    return np.array([set(tokenizer.token_bytes(i)) <= set(b'"]}') for i in range(VOCAB_SIZE)])


@pytest.fixture(scope="module", params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def compiler(backend: str) -> GrammarCompiler:
    file = resolve_model(None, progress=False) / "tokenizer.json"
    return make_compiler(backend, file, vocab_size=VOCAB_SIZE, eos_token_ids=(EOS,))


@pytest.fixture(scope="module")
def checker(backend: str) -> Iterator[GrammarChecker]:
    file = resolve_model(None, progress=False) / "tokenizer.json"
    checker = make_checker(backend, file, vocab_size=VOCAB_SIZE, eos_token_ids=(EOS,))
    yield checker
    checker.close()


class Walker:
    def __init__(
        self, compiler: GrammarCompiler, tokenizer: Tokenizer, closers: np.ndarray
    ) -> None:
        self._compiler = compiler
        self._tokenizer = tokenizer
        self._closers = closers

    def output(self, params: StructuredOutputsParams, seed: int) -> str | None:
        """Of tokens that masks allow, rather those that end it; None if it finds no end."""
        chance = random.Random(seed)
        matcher = self._compiler.matcher(params)
        mask = np.zeros(self._compiler.mask_bytes, dtype=np.uint8)
        token_ids: list[int] = []
        while len(token_ids) < MAX_TOKENS:
            matcher.write_allowed(mask.ctypes.data, mask.nbytes)
            assert not matcher.error
            allowed = np.unpackbits(mask, bitorder="little").nonzero()[0]
            if EOS in allowed and (len(allowed) == 1 or chance.random() < 0.3):
                return self._tokenizer.decode(token_ids)
            allowed = allowed[allowed != EOS]
            assert len(allowed), "stuck"
            ending = allowed[self._closers[allowed]]
            if len(ending) and chance.random() < 0.5:
                allowed = ending
            token_ids.append(int(chance.choice(allowed)))
            assert matcher.accept(token_ids[-1])
        return None


def invalid_outputs(
    walker: Walker, checker: GrammarChecker, schemas: dict[str, dict[str, object]]
) -> tuple[dict[str, str], int]:
    """By schema, and how many schemas are followed."""
    invalid: dict[str, str] = {}
    num_followed = 0
    for name, schema in schemas.items():
        params = StructuredOutputsParams(json=schema)
        if checker.error_of(params):
            continue
        num_followed += 1
        validator = jsonschema.Draft202012Validator(
            schema, format_checker=jsonschema.Draft202012Validator.FORMAT_CHECKER
        )
        for seed in range(NUM_OUTPUTS):
            output = walker.output(params, seed)
            if output is None:
                continue
            try:
                validator.validate(json.loads(output))
            except (ValueError, jsonschema.ValidationError) as error:
                invalid[name] = f"{output!r}: {error}"
    return invalid, num_followed


def test_every_schema_of_the_suite_is_obeyed_or_refused(
    backend: str,
    compiler: GrammarCompiler,
    checker: GrammarChecker,
    tokenizer: Tokenizer,
    closers: np.ndarray,
) -> None:
    walker = Walker(compiler, tokenizer, closers)
    invalid, num_followed = invalid_outputs(walker, checker, SCHEMAS)
    assert not invalid
    assert num_followed >= NUM_FOLLOWED[backend]


def test_what_a_library_would_ignore_is_refused(
    compiler: GrammarCompiler, checker: GrammarChecker, tokenizer: Tokenizer, closers: np.ndarray
) -> None:
    invalid, num_followed = invalid_outputs(Walker(compiler, tokenizer, closers), checker, TRICKY)
    assert not invalid
    assert num_followed >= 3
