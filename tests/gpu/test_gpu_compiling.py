"""An engine's kernels are compiled before its start launches them, all of them, and do the same."""

import gc
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_models import TINY_MODELS, write_tiny_model

from benchmarks.gpu.llama_8b import LLAMA_8B
from engine import LLM, SamplingParams

# In a process of its own, since kernels stay in memory.
SCRIPT = """
import sys
import torch, triton
import engine.profiling
from engine import LLM, SamplingParams

events = []
def listen(*, src, cache_hit, **_):
    kernel = f"{src.name}:{src.constants}:{src.attrs}:{src.signature}"
    events.append((kernel.replace(" ", ""), cache_hit))
triton.knobs.compilation.listener = listen
compile_kernels = engine.profiling.compile_kernels

def compile_and_count(*arguments, **options):
    compile_kernels(*arguments, **options)
    torch.cuda.synchronize()
    print("ahead", sum(not hit for _, hit in events), sum(hit for _, hit in events))
    events.clear()

engine.profiling.compile_kernels = compile_and_count
quantization = None if sys.argv[2] == "none" else sys.argv[2]
llm = LLM(
    sys.argv[1], dtype="bfloat16", quantization=quantization, kv_cache_dtype=sys.argv[3],
    gpu_memory_utilization=0.1, load_format=sys.argv[4], enforce_eager="eager" in sys.argv,
    quantization_ignore=[arg for arg in sys.argv[5:] if arg.startswith("re:")],
)
print("later", *(name for name, _ in events))
events.clear()
triton.knobs.compilation.listener = listen
choices = [
    {"temperature": 0.0}, {}, {"top_p": 0.9}, {"top_k": 20}, {"min_p": 0.1}, {"seed": 1},
    {"presence_penalty": 0.5}, {"repetition_penalty": 1.2}, {"logprobs": 2},
    {"prompt_logprobs": 1}, {"logit_bias": {5: 2.0}}, {"allowed_token_ids": (3, 4, 5)},
]
lengths = [1, 2, 15, 16, 17, 64, 100, 299, 500, 700, 1000, 1024, 1500, 2000]
for num_prompts in (1, 2, 7, 50, 150):
    prompts = [
        {"prompt_token_ids": [at % 250 + 2] * lengths[(at + num_prompts) % len(lengths)]}
        for at in range(num_prompts)
    ]
    for some in (choices[:1], choices[:3], choices):
        sampling = [
            SamplingParams(max_tokens=4 + 5 * at % 23, ignore_eos=True, **some[at % len(some)])
            for at in range(num_prompts)
        ]
        llm.generate(prompts, sampling, use_tqdm=False)
print("serving", *(name for name, _ in events))
"""


def start(model_dir: Path, cache: Path, *arguments: str) -> list[list[str]]:
    """What each line of the script says."""
    command = [sys.executable, "-c", SCRIPT, str(model_dir), *arguments]
    root = Path(__file__).parents[2]
    path = os.pathsep.join([str(root), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"TRITON_CACHE_DIR": str(cache), "PYTHONPATH": path}
    done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [line.split() for line in done.stdout.splitlines()]


@pytest.mark.parametrize("formats", [("none", "auto"), ("fp8", "fp8"), ("fp8", "auto")])
@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen3", "llama-3.1-8b"])
def test_nothing_is_compiled_behind_the_start(
    tmp_path: Path, kind: str, formats: tuple[str, str]
) -> None:
    """Neither by warming up and capturing nor by requests of all kinds."""
    check_nothing_is_compiled_behind_the_start(tmp_path, kind, *formats)


@pytest.mark.parametrize("formats", [("none", "auto"), ("fp8", "fp8")])
def test_nothing_is_compiled_behind_an_eager_start(
    tmp_path: Path, formats: tuple[str, str]
) -> None:
    check_nothing_is_compiled_behind_the_start(
        tmp_path, "llama-3.1-8b", *formats, options=("eager",)
    )


def test_nothing_is_compiled_behind_a_start_with_layers_of_two_kinds(tmp_path: Path) -> None:
    """Of which some join their products, with one of their own kind behind them or not."""
    options = ("re:model.layers.[04].mlp",)
    check_nothing_is_compiled_behind_the_start(
        tmp_path, "llama-3.1-8b", "fp8", "fp8", options=options, num_layers=5
    )


def check_nothing_is_compiled_behind_the_start(
    directory: Path, kind: str, *formats: str, options: tuple[str, ...] = (), num_layers: int = 2
) -> None:
    if kind in TINY_MODELS:
        model_dir, load_format = write_tiny_model(kind, directory / "model"), "auto"
    else:
        # Its sizes have kernels of their own.
        model_dir, load_format = write_tiny_model("llama", directory / "model"), "dummy"
        config = LLAMA_8B | {"num_hidden_layers": num_layers, "max_position_embeddings": 4096}
        (model_dir / "config.json").write_text(json.dumps(config))
    cache = directory / "cache"
    ahead, later, serving = start(model_dir, cache, *formats, load_format, *options)
    assert ahead[0] == "ahead"
    # Forks compile into the cache, where this process then finds what they made.
    assert sum(map(int, ahead[1:])) > 10
    assert later == ["later"]
    assert serving == ["serving"]


@pytest.mark.parametrize("formats", [("none", "auto"), ("fp8", "fp8")])
def test_another_start_finds_all_on_disk(tmp_path: Path, formats: tuple[str, str]) -> None:
    model_dir = write_tiny_model("llama", tmp_path / "model")
    first, *_ = start(model_dir, tmp_path / "cache", *formats, "auto")
    again, *_ = start(model_dir, tmp_path / "cache", *formats, "auto")
    assert again == ["ahead", "0", str(sum(map(int, first[1:])))]


@pytest.mark.parametrize("quantization", [None, "fp8"])
def test_answers_are_those_of_kernels_compiled_as_they_come(
    model_dir: Path,
    prompts: list[list[int]],
    monkeypatch: pytest.MonkeyPatch,
    quantization: str | None,
) -> None:
    # Steps are captured by what their launch takes, and one that is padded rounds differently.
    monkeypatch.setattr("engine.prompt_graphs._LAUNCH_SHARE", 0.0)
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
