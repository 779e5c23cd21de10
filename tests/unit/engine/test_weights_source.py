import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from engine.models.config import read_model_config
from engine.models.registry import build_model, load_model
from engine.weights.device_reader import read_places
from engine.weights.source import DummyWeights, SafetensorsWeights
from protocol.errors import StartupError

CPU = torch.device("cpu")


def open_weights(model_dir: Path, dtype: torch.dtype = torch.float32) -> SafetensorsWeights:
    return SafetensorsWeights(model_dir, dtype, CPU, progress=False)


def test_one_file(tmp_path: Path) -> None:
    values = torch.randn(3, 5)
    save_file({"a": values}, tmp_path / "model.safetensors")
    with open_weights(tmp_path) as weights:
        assert torch.equal(weights.take("a", (3, 5)), values)


def test_conversion(tmp_path: Path) -> None:
    values = torch.randn(4)
    save_file({"a": values}, tmp_path / "model.safetensors")
    with open_weights(tmp_path, torch.bfloat16) as weights:
        assert torch.equal(weights.take("a", (4,)), values.bfloat16())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_stacked(tmp_path: Path, dtype: torch.dtype) -> None:
    values = {"a": torch.randn(3, 5), "b": torch.randn(1, 5), "c": torch.randn(2, 5)}
    save_file(values, tmp_path / "model.safetensors")
    with open_weights(tmp_path, dtype) as weights:
        stacked = weights.take_stacked({name: tuple(x.shape) for name, x in values.items()})
    assert torch.equal(stacked, torch.cat(list(values.values())).to(dtype))


def test_places_in_a_file(tmp_path: Path) -> None:
    values = {"a": torch.randn(3, 5), "b": torch.arange(7, dtype=torch.int8)}
    path = tmp_path / "model.safetensors"
    save_file(values, path, metadata={"format": "pt"})
    content = path.read_bytes()
    places = read_places(path)
    assert places.keys() == values.keys()
    for name, expected in values.items():
        place = places[name]
        held = content[place.start : place.start + place.num_bytes]
        assert (place.path, place.shape) == (path, expected.shape)
        assert torch.equal(torch.frombuffer(bytearray(held), dtype=place.dtype), expected.view(-1))


def test_types_of_numbers_that_no_model_has(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(2, dtype=torch.bool)}, tmp_path / "model.safetensors")
    with pytest.raises(StartupError, match=r"'a' in .* is of type BOOL"):
        read_places(tmp_path / "model.safetensors")


def test_shards_of_an_index(tmp_path: Path) -> None:
    values = {name: torch.randn(2) for name in "abc"}
    shards = {"one.safetensors": "ab", "two.safetensors": "c"}
    for file, names in shards.items():
        save_file({name: values[name] for name in names}, tmp_path / file)
    # Such a consolidated copy lies beside some checkpoints; the index says not to read it.
    save_file({"a": torch.zeros(2)}, tmp_path / "zz-other.safetensors")
    index = {"weight_map": {name: file for file, names in shards.items() for name in names}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with open_weights(tmp_path) as weights:
        for name, expected in values.items():
            assert torch.equal(weights.take(name, (2,)), expected)
    (tmp_path / "two.safetensors").unlink()
    with pytest.raises(StartupError, match=r"lacks its weights \(two\.safetensors\)"):
        open_weights(tmp_path)


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(2)}, tmp_path / "model.safetensors")
    with open_weights(tmp_path) as weights:
        with pytest.raises(StartupError, match=r"'a' .* shape \(2,\), config.json wants \(3,\)"):
            weights.take("a", (3,))
        with pytest.raises(StartupError, match="no tensor 'b'"):
            weights.take("b", (2,))


def test_tensors_that_nobody_took_are_reported(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    names = ("a", "model.layers.0.self_attn.rotary_emb.inv_freq")
    save_file({name: torch.zeros(2) for name in names}, tmp_path / "model.safetensors")
    with open_weights(tmp_path) as weights:
        weights.take("a", (2,))
    assert not caplog.records
    with open_weights(tmp_path):
        pass
    assert "1 tensors in" in caplog.text
    assert "for example a." in caplog.text


def test_no_weights(tmp_path: Path) -> None:
    with pytest.raises(StartupError, match=r"lacks its weights \(\*\.safetensors\)"):
        open_weights(tmp_path)


def test_broken_file(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"not safetensors at all")
    with pytest.raises(StartupError, match="not a readable safetensors file"):
        open_weights(tmp_path)


def test_dummy_weights_are_equal_in_every_process_and_order() -> None:
    first, second = DummyWeights(torch.float32, CPU), DummyWeights(torch.float32, CPU)
    a, b = first.take("a.weight", (4, 4)), first.take("b.weight", (4, 4))
    assert torch.equal(second.take("b.weight", (4, 4)), b)
    assert torch.equal(second.take("a.weight", (4, 4)), a)
    assert not torch.equal(a, b)
    shapes = {"a.weight": (4, 4), "b.weight": (4, 4)}
    assert torch.equal(second.take_stacked(shapes), torch.cat((a, b)))
    assert torch.equal(first.take("input_layernorm.weight", (2,)), torch.ones(2))


def write_config(model_dir: Path, architecture: str) -> None:
    raw = {
        "architectures": [architecture],
        "vocab_size": 11,
        "hidden_size": 8,
        "intermediate_size": 12,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": 16,
    }
    (model_dir / "config.json").write_text(json.dumps(raw))


def test_dummy_format_needs_a_config_only(tmp_path: Path) -> None:
    write_config(tmp_path, "LlamaForCausalLM")
    config = read_model_config(tmp_path)
    model = load_model(config, tmp_path, dtype=torch.float32, device=CPU, load_format="dummy")
    assert model.logits(torch.randn(3, 8)).shape == (3, 11)


def test_unknown_architecture(tmp_path: Path) -> None:
    write_config(tmp_path, "MambaForCausalLM")
    with pytest.raises(StartupError, match=r"'MambaForCausalLM'; served are LlamaForCausalLM, "):
        build_model(read_model_config(tmp_path), DummyWeights(torch.float32, CPU))
