"""Sequences that were swapped go on as if nothing had happened."""

from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from tiny_llama import write_tiny_llama

from engine import LLM, SamplingParams
from engine.config import EngineConfig
from engine.scheduler.plan import StepPlan
from engine.scheduler.swap import BlockCopies
from engine.swap import HostBlocks, num_swap_blocks
from protocol.errors import StartupError
from protocol.layout import KVLayout

LAYOUT = KVLayout(
    model_fingerprint="m", num_layers=2, num_kv_heads=2, head_dim=8, block_size=4, dtype="float32"
)
PROMPTS = [{"prompt_token_ids": list(range(3, 3 + length))} for length in (1, 9, 16, 17, 30, 40)]
SAMPLING = SamplingParams(seed=5, max_tokens=40, ignore_eos=True, repetition_penalty=1.1)
TIGHT = {"num_gpu_blocks_override": 11, "max_num_batched_tokens": 24}


def make_llm(model_dir: Path, **options: Any) -> LLM:
    defaults = {"load_format": "dummy", "dtype": "float32", "num_threads": 1}
    return LLM(str(model_dir), **(defaults | options))


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def expected(model_dir: Path) -> list[list[int]]:
    return token_ids(make_llm(model_dir))


def token_ids(llm: LLM) -> list[list[int]]:
    outputs = llm.generate(PROMPTS, SAMPLING, use_tqdm=False)
    assert llm.engine.num_rows == 0
    assert llm.engine.pool.counts.referenced == 0
    assert llm._loop.scheduler.num_swapped == 0
    return [output.outputs[0].token_ids for output in outputs]


@pytest.mark.parametrize("caching", [False, True], ids=["no-cache", "prefix-cache"])
@pytest.mark.parametrize("ahead", [False, True], ids=["one-by-one", "ahead"])
def test_the_same_tokens_and_nothing_computed_twice(
    model_dir: Path,
    expected: list[list[int]],
    monkeypatch: pytest.MonkeyPatch,
    *,
    ahead: bool,
    caching: bool,
) -> None:
    llm = make_llm(
        model_dir,
        **TIGHT,
        preemption_mode="swap",
        swap_space=0.01,
        async_scheduling=ahead,
        enable_prefix_caching=caching,
    )
    plans: list[StepPlan] = []
    launch = llm.engine.launch
    monkeypatch.setattr(llm.engine, "launch", lambda plan: (plans.append(plan), launch(plan))[1])
    assert token_ids(llm) == expected
    assert sum(len(plan.preempted) for plan in plans) > 0
    assert sum(len(plan.copies.back) for plan in plans) > 0
    # Each token runs once: what a prompt has, and all outputs but the last.
    num_tokens = sum(len(prompt["prompt_token_ids"]) + 39 for prompt in PROMPTS)
    assert sum(plan.num_tokens for plan in plans) <= num_tokens


@pytest.mark.parametrize("num_swap_blocks", [0, 1, 4])
def test_with_little_room_some_are_computed_anew(
    model_dir: Path, expected: list[list[int]], num_swap_blocks: int
) -> None:
    block_bytes = make_llm(model_dir).engine.model.layout.block_bytes
    space = (num_swap_blocks + 0.5) * block_bytes / 2**30
    llm = make_llm(model_dir, **TIGHT, preemption_mode="swap", swap_space=space)
    assert llm.engine.scheduler_config.num_swap_blocks == num_swap_blocks
    assert token_ids(llm) == expected
    assert llm._loop.scheduler.stats.num_preemptions > 0


def test_space_is_taken_in_swap_mode_only() -> None:
    assert num_swap_blocks(EngineConfig(swap_space=1.0), LAYOUT) == 0
    swapping = EngineConfig(preemption_mode="swap", swap_space=1.0)
    assert num_swap_blocks(swapping, LAYOUT) == 2**30 // LAYOUT.block_bytes
    assert (
        num_swap_blocks(EngineConfig(preemption_mode="swap"), LAYOUT) == 2**32 // LAYOUT.block_bytes
    )


def test_more_than_the_machine_has_is_refused() -> None:
    num_blocks = 2 * psutil.virtual_memory().total // LAYOUT.block_bytes
    with pytest.raises(StartupError, match=r"--swap-space asks for .* GiB .* lower it"):
        HostBlocks(torch.zeros(1, 2, 2, 2, 4, 8), LAYOUT, num_blocks)


def test_copies_in_runs_and_one_by_one() -> None:
    pool = torch.randn(12, 2, 2, 2, 4, 8)
    before = pool.clone()
    host = HostBlocks(pool, LAYOUT, 6)
    out = [(3, 0), (4, 1), (5, 2), (9, 3), (1, 5)]
    host.run(BlockCopies(out=out))
    assert torch.equal(pool, before)
    pool.zero_()
    host.run(BlockCopies(back=[(10, 5), (0, 0), (1, 1), (7, 2)]))
    expected = torch.zeros_like(before)
    expected[[10, 0, 1, 7]] = before[[1, 3, 4, 5]]
    assert torch.equal(pool, expected)
    host.run(BlockCopies())
    assert torch.equal(pool, expected)
