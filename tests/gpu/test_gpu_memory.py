"""Workers keep within their shares of a card, alone and beside each other."""

import json
import subprocess
import sys
from pathlib import Path
from typing import IO

import pytest
import torch

from engine.config import EngineConfig
from engine.engine import Engine
from protocol.errors import StartupError

SHARE = 0.3
TOO_FEW_BYTES = 1_000_000_000
# Loads, says how large its pool is; runs its largest steps when told to; ends when its input does.
WORKER = """
import json, sys
from engine import LLM, SamplingParams

llm = LLM(sys.argv[1], dtype="bfloat16", gpu_memory_utilization=float(sys.argv[2]),
          max_num_seqs=64, max_num_batched_tokens=4096)
print(json.dumps(llm.engine.kv_pool.nbytes), flush=True)
sys.stdin.readline()
prompts = [{"prompt_token_ids": [2 + i, *range(2, 2 + 100 * (i % 10))]} for i in range(200)]
greedy = SamplingParams(temperature=0.8, top_p=0.9, max_tokens=16, ignore_eos=True)
outputs = llm.generate(prompts, greedy, use_tqdm=False)
print(json.dumps(sum(len(output.outputs[0].token_ids) for output in outputs)), flush=True)
sys.stdin.readline()
"""


def used_bytes() -> int:
    free_bytes, total_bytes = torch.cuda.mem_get_info()
    return total_bytes - free_bytes


def start(model_dir: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", WORKER, str(model_dir), str(SHARE)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def answer(worker: subprocess.Popen[str]) -> int:
    pipe: IO[str] | None = worker.stdout
    assert pipe is not None
    return json.loads(pipe.readline())


def go_on(worker: subprocess.Popen[str]) -> None:
    assert worker.stdin is not None
    worker.stdin.write("\n")
    worker.stdin.flush()


@pytest.mark.parametrize("at_once", [True, False], ids=["at-once", "one-after-another"])
def test_two_workers_share_a_card(model_dir: Path, *, at_once: bool) -> None:
    before_bytes = used_bytes()
    share_bytes = SHARE * torch.cuda.mem_get_info()[1]
    workers = [start(model_dir)]
    try:
        if not at_once:
            answers = [answer(workers[0])]
            workers.append(start(model_dir))
            answers.append(answer(workers[1]))
        else:
            workers.append(start(model_dir))
            answers = [answer(worker) for worker in workers]
        assert answers[0] == pytest.approx(answers[1], rel=0.02)
        assert answers[0] > 0.8 * share_bytes
        assert used_bytes() - before_bytes < 2 * share_bytes
        for worker in workers:
            go_on(worker)
        assert [answer(worker) for worker in workers] == [200 * 16] * 2
        assert used_bytes() - before_bytes < 2 * share_bytes
        for worker in workers:
            go_on(worker)
            assert worker.wait(30) == 0
    finally:
        for worker in workers:
            worker.kill()
            worker.communicate()


def test_what_does_not_fit_is_said_with_its_numbers(model_dir: Path) -> None:
    # Of a large card it's less than a caller may ask for.
    utilization = TOO_FEW_BYTES / torch.cuda.mem_get_info()[1]
    with pytest.raises(StartupError) as error:
        Engine.load(
            EngineConfig(str(model_dir), gpu_memory_utilization=utilization), progress=False
        )
    parts = ("weights need 0.0", "the largest step 0.", "CUDA graphs 0.", "Allow more than")
    for part in (f"--gpu-memory-utilization {utilization:g} of ", *parts):
        assert part in str(error.value)
