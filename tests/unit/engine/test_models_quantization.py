"""What config.json says of quantized weights, and what `--quantization` makes of it."""

from typing import Any

import pytest
import torch

from engine.models.quantization import (
    Quantization,
    read_quantization,
    requested_quantization,
)
from engine.weights.dtype import resolve_kv_dtype
from protocol.errors import StartupError

FP8 = {"num_bits": 8, "type": "float", "symmetric": True}
TOKEN = FP8 | {"strategy": "token", "dynamic": True}
STATIC = FP8 | {"strategy": "tensor", "dynamic": False}


def compressed(weights: dict[str, Any], inputs: dict[str, Any] | None) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }


def read(config: dict[str, Any]) -> Quantization | None:
    return read_quantization({"quantization_config": config})


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"quant_method": "fp8"}, Quantization("fp8")),
        ({"quant_method": "fp8", "activation_scheme": "static"}, Quantization("fp8", "static")),
        (
            {"quant_method": "fp8", "weight_block_size": [64, 32]},
            Quantization("fp8", block=(64, 32)),
        ),
        (
            compressed(FP8 | {"strategy": "channel"}, TOKEN),
            Quantization("compressed-tensors"),
        ),
        (
            compressed(FP8 | {"strategy": "tensor"}, STATIC),
            Quantization("compressed-tensors", "static"),
        ),
        (
            compressed(FP8 | {"strategy": "block", "block_structure": [128, 64]}, TOKEN),
            Quantization("compressed-tensors", block=(128, 64)),
        ),
        (
            compressed(FP8 | {"strategy": "channel"}, None),
            Quantization("compressed-tensors", "none"),
        ),
    ],
)
def test_what_is_served(config: dict[str, Any], expected: Quantization) -> None:
    assert read(config) == expected


def test_calibrated_keys_and_values() -> None:
    config = compressed(FP8 | {"strategy": "channel"}, TOKEN)
    assert read(config | {"kv_cache_scheme": STATIC}) == Quantization(
        "compressed-tensors", has_fp8_kv=True
    )
    assert read(config | {"kv_cache_scheme": None}) == Quantization("compressed-tensors")
    with pytest.raises(StartupError, match="keys and values other than fp8"):
        read(config | {"kv_cache_scheme": STATIC | {"type": "int"}})


@pytest.mark.parametrize(
    ("name", "has_fp8_kv", "expected"),
    [
        ("auto", False, torch.bfloat16),
        ("auto", True, torch.float8_e4m3fn),
        ("bfloat16", True, torch.bfloat16),
        ("fp8_e5m2", True, torch.float8_e5m2),
        ("fp8", False, torch.float8_e4m3fn),
    ],
)
def test_type_of_keys_and_values(name: str, *, has_fp8_kv: bool, expected: torch.dtype) -> None:
    model_dtype = torch.bfloat16
    assert resolve_kv_dtype(name, model_dtype=model_dtype, has_fp8_kv=has_fp8_kv) is expected
    with pytest.raises(StartupError, match="the model runs in bfloat16, and keys and values"):
        resolve_kv_dtype("float16", model_dtype=model_dtype)


def test_an_unquantized_config() -> None:
    assert read_quantization({}) is None


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"quant_method": "awq"}, r"quantized \(awq\); served are"),
        ({"quant_method": "fp8", "activation_scheme": "odd"}, "activation_scheme 'odd'"),
        (compressed({"num_bits": 4, "type": "int", "strategy": "group"}, None), "weights other"),
        (
            compressed({"num_bits": 8, "type": "int", "strategy": "channel"}, TOKEN),
            "weights other",
        ),
        (
            compressed(FP8 | {"strategy": "channel"}, {"num_bits": 8, "type": "int"}),
            "inputs other",
        ),
        ({"quant_method": "compressed-tensors", "config_groups": {}}, "several schemes or none"),
    ],
)
def test_what_is_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(StartupError, match=message):
        read(config)


def test_the_flag_and_the_checkpoint() -> None:
    stored = Quantization("compressed-tensors", "static")
    assert requested_quantization(None, None) is None
    assert requested_quantization(None, stored) is stored
    assert requested_quantization("compressed-tensors", stored) is stored
    assert requested_quantization("fp8", None) == Quantization("fp8", is_stored=False)
    with pytest.raises(StartupError, match="is quantized by compressed-tensors; leave the flag"):
        requested_quantization("fp8", stored)
    with pytest.raises(StartupError, match="needs a checkpoint that is quantized so"):
        requested_quantization("compressed-tensors", None)
