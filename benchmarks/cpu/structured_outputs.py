"""What it costs to hold outputs to a grammar: decode speed of a batch with and without one.

    python -m benchmarks.cpu.structured_outputs [--batch 32] [--out FILE]

All run in turns in one process. A counted repetition is the worst case: each count is a state of
its own, whose tokens are sought anew.
"""

import argparse
import json
import os
import subprocess
import time
from pathlib import Path
from statistics import median

from engine import LLM, SamplingParams, StructuredOutputsParams

NUM_OUTPUT_TOKENS = 64
ROUNDS = 11
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 40},
        "tags": {"type": "array", "items": {"enum": ["a", "b", "c"]}, "maxItems": 9},
        "place": {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]},
    },
    "required": ["name", "tags", "place"],
}
CASES = {
    "free": None,
    "regex": StructuredOutputsParams(regex="[A-Za-z ,.'\n]*"),
    "counted regex": StructuredOutputsParams(regex="[A-Za-z ,.'\n]{2000}"),
    "json": StructuredOutputsParams(
        json={"type": "array", "items": {"type": "string", "minLength": 20}, "minItems": 99}
    ),
}


def tokens_per_s(llm: LLM, batch: int, params: StructuredOutputsParams | None) -> float:
    """Output tokens a second, the short prompts included."""
    sampling = SamplingParams(
        temperature=0.0, max_tokens=NUM_OUTPUT_TOKENS, ignore_eos=True, structured_outputs=params
    )
    prompts = [f"Story {i}: once upon a time" for i in range(batch)]
    started = time.perf_counter()
    llm.generate(prompts, sampling, use_tqdm=False)
    return batch * NUM_OUTPUT_TOKENS / (time.perf_counter() - started)


def compile_times(llm: LLM) -> dict[str, float]:
    """Seconds for the vocabulary, which the first grammar reads, and milliseconds for a schema."""
    compiler = llm.engine.grammars
    assert compiler is not None
    started = time.perf_counter()
    compiler.matcher(StructuredOutputsParams(regex="a"))
    vocabulary_s = time.perf_counter() - started
    started = time.perf_counter()
    compiler.check(StructuredOutputsParams(json=SCHEMA), "json")
    return {"vocabulary_s": vocabulary_s, "schema_ms": 1e3 * (time.perf_counter() - started)}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    llm = LLM(enable_prefix_caching=False)
    compiling = compile_times(llm)
    for params in CASES.values():
        tokens_per_s(llm, options.batch, params)
    rounds = [
        {name: tokens_per_s(llm, options.batch, params) for name, params in CASES.items()}
        for _ in range(ROUNDS)
    ]
    commit = ["git", "rev-parse", "--short", "HEAD"]
    result = {
        "date": time.strftime("%Y-%m-%d"),
        "commit": subprocess.run(commit, capture_output=True, text=True, check=True).stdout.strip(),
        "cores": len(os.sched_getaffinity(0)),
        "load_average": os.getloadavg()[0],
        **compiling,
        "batch": options.batch,
        "tokens_per_s": {name: median(r[name] for r in rounds) for name in CASES},
        "share_of_free": {name: median(r[name] / r["free"] for r in rounds) for name in CASES},
    }
    print(json.dumps(result, indent=1))
    if options.out is not None:
        options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
