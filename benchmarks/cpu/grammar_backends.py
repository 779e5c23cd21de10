"""llguidance, xgrammar and outlines side by side: what they cost, follow, and do with harm.

    python -m benchmarks.cpu.grammar_backends [--out FILE]

Each runs in a process of its own, over the built-in model's vocabulary and the tests' schemas.
Outputs are taken from the masks at random, 32 in turns as in a batch. Times are processor time.
"""

import argparse
import ctypes
import json
import os
import platform
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from engine.grammar import GrammarCompiler, make_checker, make_compiler
from engine.weights.model_dir import resolve_model
from protocol.structured_outputs import StructuredOutputsParams as Params

sys.path.insert(0, str(Path(__file__).parents[2] / "tests" / "integration"))
from schema_suite import SCHEMAS

BACKENDS = ("llguidance", "xgrammar", "outlines")
EOS, VOCAB_SIZE = 2, 49152
BATCH, NUM_STEPS = 32, 40
REGEXES = (
    *(r"[a-z]{3,12}", r"\d{4}-\d{2}-\d{2}", r"(yes|no|maybe)", r"[A-Z][a-z]+ [A-Z][a-z]+"),
    *(r"https?://[a-z]+\.(com|org)", r"[^\n]{1,80}", r"(\w+ ){3,10}\w+\.", r"#[0-9a-f]{6}"),
    *(r"\(\d{3}\) \d{3}-\d{4}", r"[A-Za-z ,.']{200}", r"(a|b)*abb", r".{1,40}"),
)
HARMFUL = {
    "nested counts": Params(regex="(a{1,10000}){1,10000}"),
    "late choice": Params(regex="(a|b)*a(a|b){24}"),
    "long any": Params(regex='[^"]{0,5000}(x|y)[^"]{0,5000}'),
    "long string": Params(json={"type": "string", "maxLength": 1_000_000}),
    "2,000 optional keys": Params(
        json={
            "type": "object",
            "properties": {f"k{i}": {"type": "string"} for i in range(2000)},
            "additionalProperties": False,
        }
    ),
    "40 deep": Params(
        json=json.dumps({"type": "boolean"}).join(['{"type": "array", "items": ' * 40, "}" * 40])
    ),
    "one long choice": Params(choice=("a" * 200_000,)),
    "20,000 choices": Params(choice=tuple(str(i) for i in range(20_000))),
}


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def seconds(call: Callable[[], object]) -> float:
    """Of processor time: others at work on the machine don't count."""
    started = time.thread_time()
    call()
    return time.thread_time() - started


def spread(times_s: list[float]) -> dict[str, float]:
    ordered = sorted(1e3 * t for t in times_s)
    return {
        "median_ms": median(ordered),
        "p95_ms": ordered[int(0.95 * (len(ordered) - 1))],
        "max_ms": ordered[-1],
    }


class Batch:
    """Outputs of one grammar each, a token at a time."""

    def __init__(self, compiler: GrammarCompiler, grammars: list[Params]) -> None:
        self._compiler = compiler
        self._grammars = grammars
        self._chance = random.Random(0)
        self._mask = np.zeros(compiler.mask_bytes, dtype=np.uint8)
        self._matchers = [self._new() for _ in range(BATCH)]

    def _new(self) -> Any:  # noqa: ANN401
        return self._compiler.matcher(self._chance.choice(self._grammars))

    def step(self) -> tuple[float, float]:
        """Seconds for all masks of a step, and for the slowest."""
        times: list[float] = []
        for i, matcher in enumerate(self._matchers):
            times.append(
                seconds(
                    lambda m=matcher: m.write_allowed(self._mask.ctypes.data, self._mask.nbytes)
                )
            )
            allowed = np.unpackbits(self._mask, bitorder="little").nonzero()[0]
            token_id = int(self._chance.choice(allowed))
            matcher.accept(token_id)
            if token_id == EOS or matcher.is_over:
                self._matchers[i] = self._new()
        return sum(times), max(times)


def measure(backend: str) -> dict[str, Any]:
    file = resolve_model(None, progress=False) / "tokenizer.json"
    model = {"vocab_size": VOCAB_SIZE, "eos_token_ids": (EOS,)}
    checker = make_checker(backend, file, **model)
    checker.error_of(Params(regex="a"))
    before = resident_bytes()
    compiler = make_compiler(backend, file, **model)
    first_s = seconds(lambda: compiler.error_of(Params(regex="a")))
    compiler.error_of(Params(json={"type": "null"}))
    result: dict[str, Any] = {
        "start_s": first_s,
        "start_mib": (resident_bytes() - before) / 2**20,
    }
    grammars = {
        "schemas": [Params(json=schema) for schema in SCHEMAS.values()],
        "regexes": [Params(regex=regex) for regex in REGEXES],
    }
    for name, asked in grammars.items():
        followed = [params for params in asked if not checker.error_of(params)]
        compiling = [seconds(lambda p=params: compiler.error_of(p)) for params in followed]
        batch = Batch(compiler, followed)
        steps = [batch.step() for _ in range(NUM_STEPS)]
        result[name] = {
            "followed": f"{len(followed)} of {len(asked)}",
            "compile": spread(compiling),
            f"masks_of_{BATCH}": spread([total for total, _ in steps]),
            "slowest_mask_ms": 1e3 * max(slowest for _, slowest in steps),
        }
    result["json_object_compile_ms"] = 1e3 * seconds(
        lambda: compiler.error_of(Params(json_object=True))
    )
    result["with_all_mib"] = (resident_bytes() - before) / 2**20
    result["harmful"] = {}
    for name, params in HARMFUL.items():
        error = checker.error_of(params)
        result["harmful"][name] = {
            "answer": error or "followed",
            **({} if error else {"slowest_mask_ms": slowest_mask_ms(compiler, params)}),
        }
    checker.close()
    return result


def slowest_mask_ms(compiler: GrammarCompiler, params: Params) -> float:
    """Of 60 random tokens."""
    matcher, chance = compiler.matcher(params), random.Random(0)
    mask = ctypes.create_string_buffer(compiler.mask_bytes)
    slowest = 0.0
    for _ in range(60):
        slowest = max(
            slowest,
            seconds(lambda: matcher.write_allowed(ctypes.addressof(mask), compiler.mask_bytes)),
        )
        bits = np.unpackbits(np.frombuffer(mask, dtype=np.uint8), bitorder="little")
        allowed = bits.nonzero()[0]
        if matcher.is_over or not len(allowed):
            break
        matcher.accept(int(chance.choice(allowed)))
    return round(1e3 * slowest, 3)


def processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--only", choices=BACKENDS, help="measure this one in this process")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.only is not None:
        print(json.dumps(measure(options.only)))
        return
    commit = ["git", "rev-parse", "--short", "HEAD"]
    result: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"),
        "commit": subprocess.run(commit, capture_output=True, text=True, check=True).stdout.strip(),
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0)),
        "load_average": os.getloadavg()[0],
        "vocab_size": VOCAB_SIZE,
    }
    for backend in BACKENDS:
        command = [sys.executable, "-m", "benchmarks.cpu.grammar_backends", "--only", backend]
        ran = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        result[backend] = json.loads(ran.stdout.splitlines()[-1])
    print(json.dumps(result, indent=1))
    if options.out is not None:
        options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
