"""An engine's kernels are compiled before its start launches them, all of them, and do the same."""

import gc
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_models import write_tiny_model

from engine import LLM, SamplingParams

# In a process of its own, since kernels stay in memory.
SCRIPT = """
import sys
import torch, triton
import engine.profiling
from engine import LLM

events = []
def listen(*, src, cache_hit, **_):
    events.append((src.fn.__name__, cache_hit))
triton.knobs.compilation.listener = listen
compile_kernels = engine.profiling.compile_kernels

def compile_and_count(*arguments, **options):
    compile_kernels(*arguments, **options)
    torch.cuda.synchronize()
    print("ahead", sum(not hit for _, hit in events), sum(hit for _, hit in events))
    events.clear()

engine.profiling.compile_kernels = compile_and_count
quantization = None if sys.argv[2] == "none" else sys.argv[2]
LLM(
    sys.argv[1], dtype="bfloat16", quantization=quantization, kv_cache_dtype=sys.argv[3],
    gpu_memory_utilization=0.1,
)
print("later", *(name for name, _ in events))
"""


def start(model_dir: Path, cache: Path, *formats: str) -> list[list[str]]:
    """What each line of the script says."""
    command = [sys.executable, "-c", SCRIPT, str(model_dir), *formats]
    root = Path(__file__).parents[2]
    path = os.pathsep.join([str(root), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"TRITON_CACHE_DIR": str(cache), "PYTHONPATH": path}
    done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [line.split() for line in done.stdout.splitlines()]


@pytest.mark.parametrize("formats", [("none", "auto"), ("fp8", "fp8"), ("fp8", "auto")])
@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen3"])
def test_warm_up_and_capture_find_all_compiled(
    tmp_path: Path, kind: str, formats: tuple[str, str]
) -> None:
    model_dir = write_tiny_model(kind, tmp_path / "model")
    ahead, later = start(model_dir, tmp_path / "cache", *formats)
    assert ahead[0] == "ahead"
    # Forks compile into the cache, where this process then finds what they made.
    num_kernels = sum(map(int, ahead[1:]))
    assert num_kernels > 10
    assert later == ["later"]
    again, later = start(model_dir, tmp_path / "cache", *formats)
    assert again == ["ahead", "0", str(num_kernels)]
    assert later == ["later"]


@pytest.mark.parametrize("quantization", [None, "fp8"])
def test_answers_are_those_of_kernels_compiled_as_they_come(
    model_dir: Path,
    prompts: list[list[int]],
    monkeypatch: pytest.MonkeyPatch,
    quantization: str | None,
) -> None:
    answers: list[list[list[int]]] = []
    for is_ahead in (True, False):
        if not is_ahead:
            monkeypatch.setattr("engine.profiling.compile_kernels", lambda *_, **__: None)
        llm = LLM(
            str(model_dir),
            dtype="bfloat16",
            quantization=quantization,
            gpu_memory_utilization=0.1,
            enable_prefix_caching=False,
        )
        outputs = [
            llm.generate(
                {"prompt_token_ids": prompt},
                SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True),
                use_tqdm=False,
            )[0]
            for prompt in prompts
        ]
        answers.append([output.outputs[0].token_ids for output in outputs])
        del llm
        gc.collect()
        torch.cuda.empty_cache()
    assert answers[0] == answers[1]
