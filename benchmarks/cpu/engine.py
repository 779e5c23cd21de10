"""Times whole engine steps of the built-in model: prefill, decode, and what of it is Python.

    python -m benchmarks.cpu.engine [--threads 2] [--out benchmarks/results/cpu-engine.json]

`host_ms` is a step without the model: scheduling, arrays, sampling, commit. `dispatch_ms` is the
forward pass of a model of the same depth that has next to nothing to compute: the Python and call
overhead inside the real one. Medians, and minima for a machine that others use too.
"""

import argparse
import dataclasses
import json
import os
import platform
import random
import subprocess
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from engine.config import EngineConfig
from engine.engine import Engine
from engine.models.causal_lm import CausalLM
from engine.models.config import read_model_config
from engine.models.registry import build_model, load_model
from engine.sequence import Sequence
from engine.step_loop import StepLoop
from engine.weights.dtype import resolve_dtype
from engine.weights.model_dir import model_name, resolve_model
from engine.weights.source import DummyWeights
from kernels.attention import AttentionBatch, LastTokens
from protocol.ids import RequestKey
from protocol.request import Request
from protocol.sampling import SamplingParams

CPU = torch.device("cpu")
BATCHES = (1, 8, 32)
PROMPT_LENS = (32, 512, 1500)
NUM_OUTPUT_TOKENS = 64
MAX_CASE_TOKENS = 20_000  # 32 prompts of 1,500 tokens say nothing that 8 don't
SAMPLING = {
    "greedy": {"temperature": 0.0},
    "temperature": {"temperature": 0.8},
    "top_p": {"temperature": 0.8, "top_p": 0.95},
    "top_k": {"temperature": 0.8, "top_k": 40},
    "penalties": {"temperature": 0.8, "presence_penalty": 0.5, "repetition_penalty": 1.1},
}


class TimedModel:
    """A model that adds up the time spent in it."""

    def __init__(self, model: CausalLM) -> None:
        self._model = model
        self.config = model.config
        self.dtype = model.dtype
        self.device = model.device
        self.spent_s = 0.0

    def forward(
        self,
        token_ids: Tensor,
        batch: AttentionBatch,
        kv_pool: Tensor,
        last: LastTokens | None = None,
    ) -> Tensor:
        started = time.perf_counter()
        hidden = self._model.forward(token_ids, batch, kv_pool, last)
        self.spent_s += time.perf_counter() - started
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        started = time.perf_counter()
        logits = self._model.logits(hidden)
        self.spent_s += time.perf_counter() - started
        return logits


@dataclasses.dataclass(frozen=True)
class Step:
    num_tokens: int
    num_seqs: int
    total_s: float
    model_s: float


def run_case(
    engine: Engine, model: TimedModel, *, batch: int, prompt_len: int, sampling: dict[str, Any]
) -> list[Step]:
    """All steps of `batch` requests that arrive at once."""
    engine.pool.reset_cache()
    loop = StepLoop(engine)
    rng = random.Random(0)
    for i in range(batch):
        request = Request(
            key=RequestKey(str(i), 0),
            token_ids=[rng.randrange(100, 40_000) for _ in range(prompt_len)],
            num_prompt_tokens=prompt_len,
            sampling=SamplingParams(max_tokens=NUM_OUTPUT_TOKENS, ignore_eos=True, **sampling),
        )
        loop.add(Sequence(request=request, root=engine.root_hash(None), arrival_s=float(i)))
    steps: list[Step] = []
    while loop.has_work:
        queued = loop.scheduler.queued_tokens
        model.spent_s = 0.0
        started = time.perf_counter()
        num_seqs = sum(1 for _ in loop.step())
        total_s = time.perf_counter() - started
        steps.append(
            Step(
                queued - loop.scheduler.queued_tokens or num_seqs, num_seqs, total_s, model.spent_s
            )
        )
    return steps


def summarise(steps: list[Step], *, batch: int, weight_bytes: int) -> dict[str, float]:
    prefill = [step for step in steps if step.num_tokens > step.num_seqs]
    decode = [step for step in steps if step.num_tokens == step.num_seqs == batch]
    step_ms = sorted(1e3 * step.total_s for step in decode)
    host_ms = [1e3 * (step.total_s - step.model_s) for step in decode]
    prefill_s = sum(step.total_s for step in prefill)
    total_s = sum(step.total_s for step in steps)
    return {
        "prefill_tok_per_s": round(sum(step.num_tokens for step in prefill) / prefill_s, 1),
        "decode_step_ms": round(median(step_ms), 3),
        "decode_step_ms_min": round(step_ms[0], 3),
        "host_ms": round(median(host_ms), 3),
        "host_ms_min": round(min(host_ms), 3),
        "decode_tok_per_s": round(1e3 * batch / median(step_ms), 1),
        "output_tok_per_s": round(batch * NUM_OUTPUT_TOKENS / total_s, 1),
        "weights_gb_per_s": round(weight_bytes / median(step_ms) / 1e6, 2),
    }


def dispatch_ms(model: CausalLM, engine_config: EngineConfig, batch: int) -> float:
    """The forward pass of a model as deep, but with 64 values where the real one has 576."""
    config = dataclasses.replace(
        model.config,
        hidden_size=64,
        intermediate_size=64,
        num_heads=1,
        num_kv_heads=1,
        vocab_size=256,
    )
    small = TimedModel(build_model(config, DummyWeights(model.dtype, CPU)))
    engine = Engine(dataclasses.replace(engine_config, num_gpu_blocks_override=512), "small", small)
    loop = StepLoop(engine)
    for i in range(batch):
        request = Request(
            key=RequestKey(str(i), 0),
            token_ids=[1] * 8,
            num_prompt_tokens=8,
            sampling=SamplingParams(temperature=0.0, max_tokens=NUM_OUTPUT_TOKENS, ignore_eos=True),
        )
        loop.add(Sequence(request=request, root=engine.root_hash(None), arrival_s=float(i)))
    times_ms: list[float] = []
    while loop.has_work:
        small.spent_s = 0.0
        for _ in loop.step():
            pass
        times_ms.append(1e3 * small.spent_s)
    return round(median(times_ms), 3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model_dir = resolve_model(None)
    model_config = read_model_config(model_dir)
    dtype = resolve_dtype("auto", CPU, checkpoint_dtype=model_config.dtype)
    model = TimedModel(load_model(model_config, model_dir, dtype=dtype, device=CPU))
    config = EngineConfig(num_threads=options.threads, max_num_batched_tokens=2048)
    engine = Engine(config, model_name(None), model)
    weight_bytes = sum(path.stat().st_size for path in model_dir.glob("*.safetensors"))
    cases = [
        {"batch": batch, "prompt_len": prompt_len, "sampling": "greedy"}
        for prompt_len in PROMPT_LENS
        for batch in BATCHES
        if batch * prompt_len <= MAX_CASE_TOKENS
    ]
    cases += [{"batch": 32, "prompt_len": 32, "sampling": name} for name in list(SAMPLING)[1:]]
    results: list[dict[str, Any]] = []
    for case in cases:
        steps = run_case(
            engine,
            model,
            batch=case["batch"],
            prompt_len=case["prompt_len"],
            sampling=SAMPLING[case["sampling"]],
        )
        result = case | summarise(steps, batch=case["batch"], weight_bytes=weight_bytes)
        print(json.dumps(result), flush=True)
        results.append(result)
    report = {
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d"),
        "machine": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "threads": options.threads,
        "dtype": str(dtype),
        "seed": 0,
        "load_average": os.getloadavg()[0],
        "dispatch_ms": {batch: dispatch_ms(model, config, batch) for batch in BATCHES},
        "cases": results,
    }
    print(json.dumps(report["dispatch_ms"]))
    if options.out is not None:
        options.out.write_text(json.dumps(report, indent=1) + "\n")


def commit() -> str:
    command = ["git", "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


if __name__ == "__main__":
    main()
