"""Grammars that are meant to harm: an answer for each, and one for those who come after."""

import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest
from hostile_bodies import GRAMMARS, REGEXES, SCHEMAS

from engine.grammar import GrammarChecker, make_checker
from engine.grammar.trial import CPU_LIMIT_S, TrialProcess, TrialSettings
from engine.weights.model_dir import resolve_model
from protocol.errors import StartupError
from protocol.structured_outputs import StructuredOutputsParams

EOS, VOCAB_SIZE = 2, 49152
FILE = resolve_model(None, progress=False) / "tokenizer.json"
FINE = StructuredOutputsParams(regex="[a-z]{3}")


def nested(depth: int) -> dict[str, object]:
    schema: dict[str, object] = {"type": "boolean"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


def wide(size: int) -> dict[str, object]:
    return {"type": "object", "properties": {f"k{i}": {"type": "string"} for i in range(size)}}


HARMFUL = [
    StructuredOutputsParams(regex="(a{1,10000}){1,10000}"),
    StructuredOutputsParams(regex="(a|b)*a(a|b){24}"),
    StructuredOutputsParams(regex="(" * 20_000 + "a" + ")" * 20_000),
    StructuredOutputsParams(json={"type": "string", "maxLength": 10**6}),
    StructuredOutputsParams(json=nested(300)),
    StructuredOutputsParams(json="[" * 100_000),
    StructuredOutputsParams(json=wide(2000)),
    StructuredOutputsParams(json={"$ref": "#"}),
    StructuredOutputsParams(json={"allOf": [{"$ref": "#"}, {"$ref": "#"}]}),
    StructuredOutputsParams(choice=("a" * 200_000,)),
    StructuredOutputsParams(grammar="root ::= root root | root"),
    StructuredOutputsParams(grammar="root ::= " + "(" * 5000 + '"a"' + ")" * 5000),
]


@pytest.fixture(scope="module", params=["xgrammar", "outlines"])
def checker(request: pytest.FixtureRequest) -> Iterator[GrammarChecker]:
    checker = make_checker(request.param, FILE, vocab_size=VOCAB_SIZE, eos_token_ids=(EOS,))
    yield checker
    checker.close()


@pytest.mark.parametrize("params", HARMFUL, ids=lambda params: str(params)[24:80])
def test_harm_is_done_to_nobody_else(
    checker: GrammarChecker, params: StructuredOutputsParams
) -> None:
    error = checker.error_of(params)
    assert "\n" not in error
    assert not checker.error_of(FINE)


def test_what_the_fuzzers_send_is_answered(checker: GrammarChecker) -> None:
    everything = [
        *(StructuredOutputsParams(json=schema) for schema in SCHEMAS),
        *(StructuredOutputsParams(regex=regex) for regex in REGEXES),
        *(StructuredOutputsParams(grammar=grammar) for grammar in GRAMMARS),
    ]
    for params in everything:
        assert "\n" not in checker.error_of(params)
    assert not checker.error_of(FINE)


def test_a_process_that_does_not_start_stops_the_start() -> None:
    with pytest.raises(StartupError, match="by outlines ended at its start"):
        TrialProcess(
            TrialSettings(
                backend="outlines", tokenizer_file="nowhere", vocab_size=9, eos_token_ids=(EOS,)
            )
        )


def outlines(**limits: float) -> TrialProcess:
    settings = TrialSettings(
        backend="outlines",
        tokenizer_file=str(FILE),
        vocab_size=VOCAB_SIZE,
        eos_token_ids=(EOS,),
        **limits,
    )
    return TrialProcess(settings)


def test_limits_are_named() -> None:
    too_large = StructuredOutputsParams(regex="(a{1,10000}){1,10000}")
    checker = outlines()
    try:
        assert "128 MiB of memory allowed" in checker.error_of(too_large)
    finally:
        checker.close()
    checker = outlines(cpu_limit_s=0.1)
    try:
        assert "0.1 s allowed" in checker.error_of(StructuredOutputsParams(regex="a{20000}"))
        assert not checker.error_of(FINE)
    finally:
        checker.close()
    assert CPU_LIMIT_S < 5.0, "less than the router waits"


def test_a_process_that_was_killed_is_started_again() -> None:
    checker = outlines()
    try:
        assert not checker.error_of(FINE)
        os.kill(checker._process.pid, signal.SIGKILL)
        assert not checker.error_of(FINE)
        assert checker.error_of(StructuredOutputsParams(regex="("))
    finally:
        checker.close()


PARENT = """
import os, signal
from test_grammar_trial import FINE, outlines
checker = outlines()
assert not checker.error_of(FINE)
print(checker._process.pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_the_process_ends_with_the_one_that_asks() -> None:
    command = [sys.executable, "-c", PARENT]
    path = os.pathsep.join(sys.path)
    ran = subprocess.run(
        command, capture_output=True, text=True, check=False, env=os.environ | {"PYTHONPATH": path}
    )
    assert ran.returncode == -signal.SIGKILL, ran.stderr
    try:
        process = os.pidfd_open(int(ran.stdout))
    except ProcessLookupError:
        return  # it has ended already
    try:
        assert select.select([process], [], [], 30.0)[0], "readable when it has ended"
    finally:
        os.close(process)
