"""What it would bring to append tokens that a grammar forces as one chunk, not one by one.

    python -m benchmarks.cpu.jump_ahead [--batch 1 32] [--out FILE]

Both ways run in turns in one process, greedy, over one schema with long fixed keys. Forced tokens
come from llguidance's `compute_ff_tokens`; sequences that jump are resumed as after a preemption,
whose replay of the grammar is part of the time.
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
from engine.grammar import GrammarMatcher
from engine.scheduler.plan import ScheduledSequence, StepPlan
from engine.sequence import Sequence
from protocol.ids import RequestKey
from protocol.request import Request

ROUNDS = 7
MAX_TOKENS = 256
NUM_SAMPLED = 16
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
    num_steps: int
    num_forced: int
    outputs: list[list[int]]

    @property
    def tokens_per_s(self) -> float:
        return sum(map(len, self.outputs)) / self.seconds


def schema(values: dict[str, Any]) -> StructuredOutputsParams:
    return StructuredOutputsParams(
        json={
            "type": "object",
            "properties": dict.fromkeys(KEYS, values),
            "required": list(KEYS),
            "additionalProperties": False,
        }
    )


def make_sequences(llm: LLM, batch: int, params: StructuredOutputsParams) -> list[Sequence]:
    sampling = SamplingParams(temperature=0.0, max_tokens=MAX_TOKENS, structured_outputs=params)
    sequences: list[Sequence] = []
    for i in range(batch):
        prompt = llm.tokenizer.encode(f"Order {i} as JSON with its customer, amount and address: ")
        request = Request(
            key=RequestKey(f"r{i}", 1),
            token_ids=prompt,
            num_prompt_tokens=len(prompt),
            sampling=sampling,
        )
        sequence = Sequence(request, llm.engine.root_hash(None), arrival_s=0.0)
        blocks = llm.engine.pool.allocate(llm.engine.pool.num_blocks_for(len(prompt) + MAX_TOKENS))
        assert blocks is not None
        sequence.block_ids = blocks
        sequences.append(sequence)
    return sequences


def run(llm: LLM, batch: int, params: StructuredOutputsParams, *, jumps: bool) -> Run:
    engine = llm.engine
    assert engine.grammars is not None
    sequences = make_sequences(llm, batch, params)
    matchers = {s.key: engine.grammars.matcher(params) for s in sequences}
    num_steps = num_forced = 0
    going = list(sequences)
    started = time.perf_counter()
    while going:
        plan = StepPlan(
            [ScheduledSequence(s, s.num_uncomputed_tokens, samples=True) for s in going]
        )
        sampled = engine.execute(plan)
        num_steps += 1
        for item, token in zip(plan.scheduled, sampled, strict=True):
            item.sequence.num_computed_tokens += item.num_new_tokens
            item.sequence.token_ids.append(token.token_id)
        if jumps:
            for sequence in going:
                num_forced += jump(engine, sequence, matchers[sequence.key])
        going = [s for s in going if not is_over(llm, s)]
    seconds = time.perf_counter() - started
    for sequence in sequences:
        engine.release(sequence)
        engine.pool.free(sequence.block_ids)
    outputs = [s.token_ids[s.request.num_prompt_tokens :] for s in sequences]
    return Run(seconds, num_steps, num_forced, outputs)


def jump(engine: Any, sequence: Sequence, matcher: GrammarMatcher) -> int:  # noqa: ANN401
    """Appends the tokens that must follow the one just sampled; returns their number."""
    matcher.accept(sequence.token_ids[-1])
    forced = matcher.forced_tokens()
    if not forced:
        return 0
    for token_id in forced:
        matcher.accept(token_id)
    engine.release(sequence)
    sequence.token_ids += forced
    return len(forced)


def is_over(llm: LLM, sequence: Sequence) -> bool:
    is_end = sequence.token_ids[-1] in llm.engine.model.eos_token_ids
    return is_end or sequence.num_output_tokens >= MAX_TOKENS


def compare(llm: LLM, batch: int, params: StructuredOutputsParams, rounds: int) -> dict[str, Any]:
    for jumps in (False, True):
        run(llm, batch, params, jumps=jumps)
    pairs = [
        (run(llm, batch, params, jumps=False), run(llm, batch, params, jumps=True))
        for _ in range(rounds)
    ]
    one_by_one, jumping = pairs[0]
    same_tokens = sum(a == b for a, b in zip(one_by_one.outputs, jumping.outputs, strict=True))
    texts = [
        tuple(llm.tokenizer.decode(tokens) for tokens in outputs)
        for outputs in zip(one_by_one.outputs, jumping.outputs, strict=True)
    ]
    return {
        "steps_one_by_one": one_by_one.num_steps,
        "steps_jumping": jumping.num_steps,
        "tokens_one_by_one": sum(map(len, one_by_one.outputs)),
        "tokens_jumping": sum(map(len, jumping.outputs)),
        "tokens_forced": jumping.num_forced,
        "ms_one_by_one": 1e3 * median(a.seconds for a, _ in pairs),
        "ms_jumping": 1e3 * median(b.seconds for _, b in pairs),
        "speedup": median(a.seconds / b.seconds for a, b in pairs),
        "speedups": sorted(round(a.seconds / b.seconds, 2) for a, b in pairs),
        "share_of_outputs_with_the_same_tokens": same_tokens / batch,
        "share_of_outputs_with_the_same_text": sum(a == b for a, b in texts) / batch,
        "an_output": {"one_by_one": texts[0][0], "jumping": texts[0][1]},
    }


def share_jumps_would_change(
    llm: LLM, params: StructuredOutputsParams, *, temperature: float
) -> float:
    """Of outputs sampled one by one, those with other tokens than the forced ones somewhere. None,
    as long as a mask leaves no other way to spell bytes that are forced."""
    sampling = SamplingParams(
        temperature=temperature, seed=1, n=NUM_SAMPLED, max_tokens=512, structured_outputs=params
    )
    [answer] = llm.generate("An order as JSON: ", sampling, use_tqdm=False)
    assert llm.engine.grammars is not None
    num_changed = 0
    for output in answer.outputs:
        matcher = llm.engine.grammars.matcher(params)
        num_changed += not _is_as_forced(matcher, output.token_ids)
    return num_changed / len(answer.outputs)


def _is_as_forced(matcher: GrammarMatcher, token_ids: list[int]) -> bool:
    for i, token_id in enumerate(token_ids):
        forced = matcher.forced_tokens()
        if forced != token_ids[i : i + len(forced)]:
            return False
        matcher.accept(token_id)
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--values", nargs="+", choices=VALUES, default=list(VALUES))
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    llm = LLM(enable_prefix_caching=False)
    commit = ["git", "rev-parse", "--short", "HEAD"]
    result: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"),
        "commit": subprocess.run(commit, capture_output=True, text=True, check=True).stdout.strip(),
        "cores": len(os.sched_getaffinity(0)),
        "load_average": os.getloadavg()[0],
    }
    choices = schema(VALUES["choices"])
    result["share_of_outputs_that_jumps_would_change"] = {
        f"temperature {temperature}": share_jumps_would_change(
            llm, choices, temperature=temperature
        )
        for temperature in (0.0, 0.5, 1.0)
    }
    for batch in options.batch:
        for name in options.values:
            params = schema(VALUES[name])
            result[f"batch {batch}, {name}"] = compare(llm, batch, params, options.rounds)
    print(json.dumps(result, indent=1))
    if options.out is not None:
        options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
