"""Jumps over forced tokens beside CUDA graphs and with steps that run ahead."""

import gc
from typing import Any

import pytest

from engine import LLM, SamplingParams, StructuredOutputsParams
from engine.runner import ModelRunner
from engine.running_step import RunningStep
from engine.scheduler.plan import StepPlan

KEYS = ("customer_identification_number", "is_returning_customer", "last_purchase_timestamp")
SCHEMA = {
    "type": "object",
    "properties": {key: {"type": "integer", "minimum": 0, "maximum": 99999} for key in KEYS},
    "required": list(KEYS),
    "additionalProperties": False,
}
OPTIONS: dict[str, Any] = {"dtype": "float32", "gpu_memory_utilization": 0.1, "max_num_seqs": 8}


@pytest.mark.parametrize("eager", [False, True], ids=["graphs", "eager"])
def test_same_tokens_in_fewer_steps(monkeypatch: pytest.MonkeyPatch, *, eager: bool) -> None:
    samplings = [
        SamplingParams(
            temperature=temperature,
            seed=5,
            max_tokens=128,
            frequency_penalty=penalty,
            structured_outputs=StructuredOutputsParams(json=SCHEMA),
        )
        for temperature in (0.0, 1.0)
        for penalty in (0.0, 0.5)
    ]
    free = SamplingParams(temperature=1.0, seed=6, max_tokens=64, ignore_eos=True)
    found: list[list[list[int]]] = []
    nums_steps: list[int] = []
    launch = ModelRunner.launch
    for jump_ahead in (False, True):
        llm = LLM(**OPTIONS, enforce_eager=eager, jump_ahead=jump_ahead)
        plans: list[StepPlan] = []

        def noted(
            runner: ModelRunner, plan: StepPlan, plans: list[StepPlan] = plans
        ) -> RunningStep:
            plans.append(plan)
            return launch(runner, plan)

        with monkeypatch.context() as patch:
            patch.setattr(ModelRunner, "launch", noted)
            alone = llm.generate(["An order: "], samplings[0], use_tqdm=False)
        nums_steps.append(len([plan for plan in plans if plan.scheduled]))
        together = llm.generate(["An order: "] * 5, [*samplings, free], use_tqdm=False)
        found.append([answer.outputs[0].token_ids for answer in (*alone, *together)])
        assert llm.engine.num_rows == 0
        llm.engine.pool.check_integrity()
        # Its memory, cycles and all, before the next one's.
        del llm
        gc.collect()
    assert found[1] == found[0]
    assert nums_steps[1] < nums_steps[0] / 2
