"""Scales of 8-bit keys and values, as checkpoints carry them."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from engine.layers.attention import read_kv_scales
from engine.weights.source import SafetensorsWeights
from kernels.kv_format import UNSCALED, KVScales

LAYER = "model.layers.0.self_attn"


@pytest.mark.parametrize("owners", [("", ""), ("attn.", "attn."), ("k_proj.", "v_proj.")])
@pytest.mark.parametrize("shape", [(), (1,)])
def test_each_name_in_use(tmp_path: Path, owners: tuple[str, str], shape: tuple[int, ...]) -> None:
    values = {f"{LAYER}.{owners[0]}k_scale": 0.25, f"{LAYER}.{owners[1]}v_scale": 1.5}
    tensors = {name: torch.full(shape, value) for name, value in values.items()}
    save_file(tensors, tmp_path / "model.safetensors")
    device = torch.device("cpu")
    with SafetensorsWeights(tmp_path, torch.bfloat16, device, progress=False) as weights:
        assert read_kv_scales(weights, LAYER) == KVScales(k=0.25, v=1.5)
        assert read_kv_scales(weights, "model.layers.1.self_attn") == UNSCALED
