"""Who asks for FlashAttention 3 where it can't be had is told so before weights are loaded."""

from pathlib import Path

import pytest
import torch
from test_runner_batch import model_config
from tiny_llama import write_tiny_llama

from engine.attention_backend import check_flash_attention
from engine.config import EngineConfig
from engine.engine import Engine
from engine.made_up_steps import warm_up_steps
from engine.models.registry import load_model
from engine.runner import ModelRunner
from kernels.attention import AttentionBatch
from kernels.fp8 import FP8
from protocol.errors import StartupError

FITS = {
    "device": torch.device("cuda"),
    "dtype": torch.bfloat16,
    "kv_dtype": torch.bfloat16,
    "head_dim": 128,
    "layer_windows": (512, None),
}


def refusal(**changed: object) -> str:
    with pytest.raises(StartupError) as caught:
        check_flash_attention(**(FITS | changed))
    text = str(caught.value)
    assert text.startswith("--attention-backend flash-attn ")
    assert "\n" not in text
    return text


def test_a_cpu_has_none(tmp_path: Path) -> None:
    assert "Hopper GPU" in refusal(device=torch.device("cpu"))
    model_dir = str(write_tiny_llama(tmp_path))
    # There are no weights: it hasn't come to that.
    config = EngineConfig(model=model_dir, device="cpu", attention_backend="FLASH_ATTN")
    with pytest.raises(StartupError, match="such as an H100, not a CPU"):
        Engine.load(config, progress=False)


def test_what_it_must_have_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    from kernels.gpu import cards, flash_attention

    monkeypatch.setattr(cards, "is_hopper_card", lambda _: True)
    monkeypatch.setattr(flash_attention, "library", lambda: None)
    check_flash_attention(**FITS)
    check_flash_attention(**(FITS | {"kv_dtype": FP8, "head_dim": 64}))
    assert "float16" in refusal(dtype=torch.float16)
    assert "not in float8_e5m2" in refusal(kv_dtype=torch.float8_e5m2)
    assert "this model's have 80" in refusal(head_dim=80)
    assert "sliding windows" in refusal(layer_windows=(512, 512))

    def missing() -> None:
        raise ImportError("there is no module fa3_fwd_interface")

    monkeypatch.setattr(flash_attention, "library", missing)
    text = refusal()
    assert "pip install 'tandem[flash-attn]'" in text
    assert "there is no module fa3_fwd_interface" in text
    monkeypatch.setattr(cards, "is_hopper_card", lambda _: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA B200")
    assert "not NVIDIA B200" in refusal()


@pytest.mark.parametrize("uses_it", [False, True])
def test_steps_say_whether_it_is_wanted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, uses_it: bool
) -> None:
    config, cpu = model_config(tmp_path), torch.device("cpu")
    model = load_model(config, tmp_path, dtype=torch.float32, device=cpu, load_format="dummy")
    seen: list[AttentionBatch] = []
    forward = model.forward

    def recording(token_ids: torch.Tensor, batch: AttentionBatch, *rest: object) -> torch.Tensor:
        seen.append(batch)
        return forward(token_ids, batch, *rest)

    monkeypatch.setattr(model, "forward", recording)
    pool = torch.zeros(8, config.num_layers, 2, config.num_kv_heads, 16, config.head_dim)
    runner = ModelRunner(model, pool, root_seed=0, uses_flash_attention=uses_it)
    runner.launch(next(warm_up_steps(block_size=16, max_tokens=30, is_gpu=False)))
    assert [batch.uses_flash_attention for batch in seen] == [uses_it]
