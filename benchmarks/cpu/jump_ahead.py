"""What it brings to jump over the tokens that a grammar forces.

    python -m benchmarks.cpu.jump_ahead [--batch 1 32] [--threads 1] [--out FILE]

Two engines in one process, one with jumps and one without, take turns over the same requests: a
schema with long fixed keys. Prompts are short, and their prefill is part of the time. With one
thread, processor time says what a machine with nothing else to do would take.
"""

import argparse
import json
import os
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from engine import LLM, SamplingParams, StructuredOutputsParams
from engine.running_step import RunningStep
from engine.scheduler.plan import StepPlan

ROUNDS = 7
MAX_TOKENS = 256
KEYS = (
    "customer_identification_number",
    "preferred_delivery_address_line",
    "estimated_total_amount_in_cents",
    "is_returning_customer",
    "last_purchase_timestamp",
)
VALUES = {
    "choices": {"type": "boolean"},
    "numbers": {"type": "integer", "minimum": 0, "maximum": 99999},
    "words": {"type": "string", "pattern": "^[A-Za-z ]{12,24}$"},
}


@dataclass
class Run:
    seconds: float
    cpu_s: float
    num_steps: int
    outputs: list[list[int]]


class CountedSteps:
    """An `LLM` whose steps are counted."""

    def __init__(self, *, jump_ahead: bool, num_threads: int | None) -> None:
        self._llm = LLM(enable_prefix_caching=False, jump_ahead=jump_ahead, num_threads=num_threads)
        self._num_steps = 0
        launch = self._llm.engine.launch

        def counted(plan: StepPlan) -> RunningStep:
            self._num_steps += bool(plan.scheduled)
            return launch(plan)

        self._llm.engine.launch = counted

    def run(self, batch: int, sampling: SamplingParams) -> Run:
        prompts = [f"Order {i} as JSON with its customer and amount: " for i in range(batch)]
        self._num_steps = 0
        started, cpu_started = time.perf_counter(), time.process_time()
        answers = self._llm.generate(prompts, sampling, use_tqdm=False)
        seconds, cpu_s = time.perf_counter() - started, time.process_time() - cpu_started
        outputs = [answer.outputs[0].token_ids for answer in answers]
        return Run(seconds, cpu_s, self._num_steps, outputs)


def sampling(values: dict[str, Any], temperature: float) -> SamplingParams:
    schema = {
        "type": "object",
        "properties": dict.fromkeys(KEYS, values),
        "required": list(KEYS),
        "additionalProperties": False,
    }
    return SamplingParams(
        temperature=temperature,
        seed=1,
        max_tokens=MAX_TOKENS,
        structured_outputs=StructuredOutputsParams(json=schema),
    )


def compare(
    one_by_one: CountedSteps, jumping: CountedSteps, batch: int, values: dict[str, Any], rounds: int
) -> dict[str, Any]:
    warm_up = [
        one_by_one.run(batch, sampling(values, 1.0)),
        jumping.run(batch, sampling(values, 1.0)),
    ]
    greedy = sampling(values, 0.0)
    pairs = [(one_by_one.run(batch, greedy), jumping.run(batch, greedy)) for _ in range(rounds)]
    first, second = pairs[0]
    return {
        "tokens": sum(map(len, first.outputs)),
        "steps_one_by_one": first.num_steps,
        "steps_jumping": second.num_steps,
        "ms_one_by_one": 1e3 * median(a.seconds for a, _ in pairs),
        "ms_jumping": 1e3 * median(b.seconds for _, b in pairs),
        "cpu_ms_one_by_one": 1e3 * median(a.cpu_s for a, _ in pairs),
        "cpu_ms_jumping": 1e3 * median(b.cpu_s for _, b in pairs),
        "speedups": sorted(round(a.seconds / b.seconds, 2) for a, b in pairs),
        "speedups_in_cpu_time": sorted(round(a.cpu_s / b.cpu_s, 2) for a, b in pairs),
        "share_of_outputs_with_the_same_tokens": {
            "temperature 0": same(first, second),
            "temperature 1": same(*warm_up),
        },
    }


def same(one_by_one: Run, jumping: Run) -> float:
    pairs = zip(one_by_one.outputs, jumping.outputs, strict=True)
    return sum(a == b for a, b in pairs) / len(jumping.outputs)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--values", nargs="+", choices=VALUES, default=list(VALUES))
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--threads", type=int, help="default: all cores")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    one_by_one, jumping = (
        CountedSteps(jump_ahead=jump_ahead, num_threads=options.threads)
        for jump_ahead in (False, True)
    )
    commit = ["git", "rev-parse", "--short", "HEAD"]
    result: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"),
        "commit": subprocess.run(commit, capture_output=True, text=True, check=True).stdout.strip(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": options.threads,
        "load_average": os.getloadavg()[0],
    }
    for batch in options.batch:
        for name in options.values:
            result[f"batch {batch}, {name}"] = compare(
                one_by_one, jumping, batch, VALUES[name], options.rounds
            )
    print(json.dumps(result, indent=1))
    if options.out is not None:
        options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
