"""Checkpoints in fp8, written here in each format, against models of their dequantized weights."""

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models
from torch import Tensor

from engine import LLM, SamplingParams
from engine.layers.projection import DenseProjection, Fp8Projection, load_projection
from engine.models.config import read_model_config
from engine.models.quantization import Quantization
from engine.weights.fp8 import Fp8Weight, take_dense, take_linear
from engine.weights.source import DummyWeights, LinearFormat, SafetensorsWeights
from kernels.fp8 import FP8, FP8_MAX, quantize_rows, quantize_weight
from kernels.linear import linear_reference, pack_linear
from protocol.errors import StartupError

CPU = torch.device("cpu")
SHAPE: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": None,
    "initializer_range": 0.2,
}
TOKEN = {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True}
BLOCK = 16


def compressed(strategy: str, inputs: dict[str, Any] | None) -> dict[str, Any]:
    weights = {"num_bits": 8, "type": "float", "strategy": strategy, "symmetric": True}
    if strategy == "block":
        weights["block_structure"] = [BLOCK, BLOCK]
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head", "model.layers.1.mlp.down_proj"],
    }


def to_fp8(values: Tensor, scale: Tensor) -> Tensor:
    return (values / scale).clamp(-FP8_MAX, FP8_MAX).to(FP8)


def per_channel(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """What the checkpoint stores of a weight, and the weight that it means."""
    scale = weight.abs().amax(1, keepdim=True) / FP8_MAX
    values = to_fp8(weight, scale)
    return {"weight": values, "weight_scale": scale}, values.float() * scale


def per_tensor(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    scale = weight.abs().max() / FP8_MAX
    values = to_fp8(weight, scale)
    stored = {"weight": values, "weight_scale": scale, "input_scale": torch.tensor(0.05)}
    return stored, values.float() * scale


def per_block(
    weight: Tensor, *, name: str = "weight_scale_inv"
) -> tuple[dict[str, Tensor], Tensor]:
    rows, columns = (-(-size // BLOCK) for size in weight.shape)
    scale = torch.rand(rows, columns) * 0.01 + 0.01
    spread = scale.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
    spread = spread[: weight.shape[0], : weight.shape[1]]
    values = to_fp8(weight, spread)
    return {"weight": values, name: scale}, values.float() * spread


FORMATS: dict[str, tuple[dict[str, Any], Any]] = {
    "compressed-channel": (compressed("channel", TOKEN), per_channel),
    "compressed-static": (
        compressed("tensor", TOKEN | {"strategy": "tensor", "dynamic": False}),
        per_tensor,
    ),
    "compressed-weights-only": (compressed("channel", None), per_channel),
    "compressed-block": (
        compressed("block", TOKEN),
        lambda weight: per_block(weight, name="weight_scale"),
    ),
    "fp8-dynamic": ({"quant_method": "fp8", "activation_scheme": "dynamic"}, per_tensor),
    "fp8-static": ({"quant_method": "fp8", "activation_scheme": "static"}, per_tensor),
    "fp8-block": (
        {
            "quant_method": "fp8",
            "activation_scheme": "dynamic",
            "weight_block_size": [BLOCK, BLOCK],
            "modules_to_not_convert": ["lm_head", "model.layers.1.mlp.down_proj"],
        },
        per_block,
    ),
}


def write_model(model_dir: Path) -> Any:
    """An unquantized random model with a tokenizer of nothing, as transformers saves it."""
    torch.manual_seed(3)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE)).eval()
    model.save_pretrained(model_dir)
    return model


def quantize_checkpoint(model_dir: Path, config: dict[str, Any], pack: Any) -> dict[str, Tensor]:
    """Rewrites the directory; what its weights mean, by name."""
    path = model_dir / "model.safetensors"
    stored, meant = {}, {}
    for name, tensor in load_file(path).items():
        is_linear = name.endswith("_proj.weight") and "layers.1.mlp.down" not in name
        if not is_linear:
            stored[name] = meant[name] = tensor
            continue
        parts, meant[name] = pack(tensor)
        for suffix, part in parts.items():
            stored[f"{name.removesuffix('weight')}{suffix}"] = part
    save_file(stored, path)
    raw = json.loads((model_dir / "config.json").read_text())
    (model_dir / "config.json").write_text(json.dumps(raw | {"quantization_config": config}))
    return meant


def write_tokenizer(model_dir: Path) -> None:
    """A tokenizer that no test uses, for a model that can't do without."""
    tokenizer = Tokenizer(models.WordLevel({str(i): i for i in range(97)}, unk_token="0"))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(model_dir / "tokenizer.json"))


def greedy(model: Any, prompt: list[int], count: int) -> list[int]:
    ids = torch.tensor([prompt])
    for _ in range(count):
        with torch.inference_mode():
            logits = model(ids, use_cache=False).logits[0, -1]
        ids = torch.cat([ids, logits.argmax().reshape(1, 1)], 1)
    return ids[0, len(prompt) :].tolist()


def assert_greedy_parity(model_dir: Path, reference: Any, **options: Any) -> None:
    llm = LLM(str(model_dir), dtype="float32", device="cpu", num_gpu_blocks_override=64, **options)
    rng = random.Random(5)
    prompts = [[rng.randrange(2, 97) for _ in range(length)] for length in (1, 7, 30)]
    sampling = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
    outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], sampling, use_tqdm=False)
    expected = [greedy(reference, prompt, 12) for prompt in prompts]
    assert [output.outputs[0].token_ids for output in outputs] == expected


@pytest.mark.parametrize("name", FORMATS)
def test_greedy_parity_with_the_dequantized_model(name: str, tmp_path: Path) -> None:
    config, pack = FORMATS[name]
    reference = write_model(tmp_path)
    write_tokenizer(tmp_path)
    meant = quantize_checkpoint(tmp_path, config, pack)
    reference.load_state_dict(meant)
    assert_greedy_parity(tmp_path, reference)


def test_greedy_parity_of_quantizing_while_loading(tmp_path: Path) -> None:
    reference = write_model(tmp_path)
    write_tokenizer(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    for name in weights:
        if name.endswith("_proj.weight"):
            weights[name] = quantize_weight(weights[name]).dequantized(torch.float32)
    reference.load_state_dict(weights)
    assert_greedy_parity(tmp_path, reference, quantization="fp8")


@pytest.mark.parametrize("name", ["compressed-channel", "compressed-static", "fp8-static"])
def test_products_of_8_bits(name: str, tmp_path: Path) -> None:
    """As on a GPU: inputs are rounded to 8 bits too."""
    write_model(tmp_path)
    meant = quantize_checkpoint(tmp_path, *FORMATS[name])
    config = read_model_config(tmp_path)
    prefix = "model.layers.0.self_attn"
    sizes = {"q_proj": 32, "k_proj": 16, "v_proj": 16}
    with SafetensorsWeights(
        tmp_path,
        torch.float32,
        CPU,
        linear_format=LinearFormat(config.quantization, multiplies_fp8=True),
        progress=False,
    ) as weights:
        projection = load_projection(weights, prefix, sizes, 32, bias=False)
        ignored = load_projection(weights, "model.layers.1.mlp", {"down_proj": 32}, 48, bias=False)
    assert isinstance(projection, Fp8Projection)
    assert isinstance(ignored, DenseProjection)
    scale = torch.tensor([0.05]) if "static" in name else None
    x = torch.randn(5, 32)
    weight = torch.cat([meant[f"{prefix}.{part}.weight"] for part in sizes])
    expected = linear_reference(quantize_rows(x, scale).dequantized(x.dtype), pack_linear(weight))
    torch.testing.assert_close(projection.forward(x), expected, atol=1e-4, rtol=1e-4)


def test_projections_that_are_quantized_in_part(tmp_path: Path) -> None:
    """What is joined is served in one type, with each part's own meaning."""
    stored, meant = per_channel(torch.randn(16, 32))
    plain = torch.randn(8, 32)
    tensors = {f"a.{key}": value for key, value in stored.items()}
    save_file(tensors | {"b.weight": plain}, tmp_path / "model.safetensors")
    with SafetensorsWeights(
        tmp_path,
        torch.float32,
        CPU,
        linear_format=LinearFormat(Quantization("compressed-tensors"), multiplies_fp8=True),
        progress=False,
    ) as weights:
        joined = take_linear(weights, {"a": (16, 32), "b": (8, 32)})
    assert isinstance(joined, Tensor)
    assert torch.equal(joined, torch.cat([meant, plain]))


def test_a_head_in_8_bits_is_dequantized(tmp_path: Path) -> None:
    stored, meant = per_channel(torch.randn(16, 32))
    save_file(
        {f"lm_head.{key}": value for key, value in stored.items()}, tmp_path / "a.safetensors"
    )
    with SafetensorsWeights(
        tmp_path,
        torch.float32,
        CPU,
        linear_format=LinearFormat(Quantization("fp8")),
        progress=False,
    ) as weights:
        assert torch.equal(take_dense(weights, "lm_head", (16, 32)), meant)


@pytest.mark.parametrize(
    ("scale", "quantization", "message"),
    [
        (torch.ones(3), Quantization("fp8"), r"scale of shape \(3,\)"),
        (None, Quantization("fp8"), "has no scale"),
        (torch.ones(1), None, "needs a quantization_config"),
    ],
)
def test_what_does_not_fit_is_named(
    scale: Tensor | None, quantization: Quantization | None, message: str, tmp_path: Path
) -> None:
    tensors = {"a.weight": torch.ones(16, 32).to(FP8)}
    if scale is not None:
        tensors["a.weight_scale"] = scale
    save_file(tensors, tmp_path / "model.safetensors")
    with (
        SafetensorsWeights(
            tmp_path,
            torch.float32,
            CPU,
            linear_format=LinearFormat(quantization),
            progress=False,
        ) as weights,
        pytest.raises(StartupError, match=message),
    ):
        take_linear(weights, {"a": (16, 32)})


def test_random_weights_are_quantized_alike() -> None:
    plain, quantized = (
        DummyWeights(torch.float32, CPU, linear_format=LinearFormat(quantization))
        for quantization in (None, Quantization("fp8", is_stored=False))
    )
    weight = take_linear(plain, {"a": (16, 32)})
    assert isinstance(weight, Tensor)
    rows = take_linear(quantized, {"a": (16, 32)})
    assert not isinstance(rows, Tensor)
    torch.testing.assert_close(rows.rows.dequantized(torch.float32), weight, atol=0, rtol=0.07)


@pytest.mark.parametrize(
    ("ignored", "names", "kind"),
    [
        ((), ("model.layers.1.mlp.down_proj",), Fp8Weight),
        (("model.layers.1.mlp.down_proj",), ("model.layers.1.mlp.down_proj",), Tensor),
        (("model.layers.1",), ("model.layers.1.mlp.down_proj",), Tensor),
        (("model.layers.1",), ("model.layers.11.mlp.down_proj",), Fp8Weight),
        (("re:.*down",), ("model.layers.1.mlp.down_proj",), Tensor),
        (("re:down",), ("model.layers.1.mlp.down_proj",), Fp8Weight),
        (("re:.*up",), ("model.layers.1.mlp.gate_proj", "model.layers.1.mlp.up_proj"), Tensor),
    ],
)
def test_layers_that_are_ignored_stay_as_they_are(
    ignored: tuple[str, ...], names: tuple[str, ...], kind: type
) -> None:
    """Those that are joined to one, too."""
    quantization = Quantization("fp8", is_stored=False, ignored=ignored)
    weights = DummyWeights(torch.float32, CPU, linear_format=LinearFormat(quantization))
    assert isinstance(take_linear(weights, dict.fromkeys(names, (16, 32))), kind)


def test_models_of_other_ignored_layers_are_others(tmp_path: Path) -> None:
    write_model(tmp_path)
    config = read_model_config(tmp_path)
    ignored = ("model.layers.0.mlp", "re:.*o_proj")
    some = config.quantized("fp8", ignored)
    assert some.quantization == Quantization("fp8", is_stored=False, ignored=ignored)
    assert some.fingerprint == config.quantized("fp8", ignored[::-1]).fingerprint
    others = (config, config.quantized("fp8"), config.quantized("fp8", ignored[:1]))
    assert some.fingerprint not in {other.fingerprint for other in others}


@pytest.mark.parametrize(
    ("method", "pattern", "message"),
    [
        ("fp8", "re:(", r"'re:\(' is no pattern: missing \), unterminated subpattern"),
        ("fp8", "re:a{99999999999}", "is no pattern: the repetition number is too large"),
        ("fp8", "lm_head", r"'lm_head' names no linear layer; .* is model.layers.1.mlp.down_proj"),
        (None, "re:.*mlp", "is for weights that --quantization fp8 quantizes while loading"),
    ],
)
def test_ignored_layers_that_make_no_sense(
    tmp_path: Path, method: str | None, pattern: str, message: str
) -> None:
    write_model(tmp_path)
    with pytest.raises(StartupError, match=message):
        read_model_config(tmp_path).quantized(method, (pattern,))


def test_a_quantized_checkpoint_says_itself_what_is_ignored(tmp_path: Path) -> None:
    write_model(tmp_path)
    quantize_checkpoint(tmp_path, *FORMATS["fp8-dynamic"])
    with pytest.raises(StartupError, match="quantizes while loading"):
        read_model_config(tmp_path).quantized("fp8", ("re:.*mlp",))


def test_fingerprints_tell_quantized_from_unquantized(tmp_path: Path) -> None:
    write_model(tmp_path)
    config = read_model_config(tmp_path)
    online = config.quantized("fp8")
    assert online.quantization == Quantization("fp8", is_stored=False)
    assert online == replace(
        read_model_config(tmp_path),
        quantization=online.quantization,
        fingerprint=online.fingerprint,
    )
    assert config.quantized(None) is config
    quantize_checkpoint(tmp_path, *FORMATS["fp8-dynamic"])
    stored = read_model_config(tmp_path)
    assert stored.quantized("fp8") is stored
    assert len({config.fingerprint, online.fingerprint, stored.fingerprint}) == 3
    assert config.root_hash(8) != online.root_hash(8)
