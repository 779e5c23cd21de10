"""Weights read straight to the device are those in the files."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from engine.weights.source import SafetensorsWeights
from protocol.errors import StartupError

CUDA = torch.device("cuda")
# Some chunks, and one that isn't whole; nothing; a scalar's worth.
SHAPES = {"large": (5000, 1031), "empty": (0, 1031), "row": (1, 1031), "other": (2048, 1031)}


def write(model_dir: Path, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    torch.manual_seed(3)
    values = {name: torch.randn(shape).to(dtype) for name, shape in SHAPES.items()}
    for name, tensor in values.items():
        save_file({name: tensor}, model_dir / f"{name}.safetensors")
    return values


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_values_and_conversion(tmp_path: Path, dtype: torch.dtype) -> None:
    values = write(tmp_path, dtype)
    with SafetensorsWeights(tmp_path, torch.bfloat16, CUDA, progress=False) as weights:
        stacked = weights.take_stacked(SHAPES)
        alone = weights.take("other", SHAPES["other"])
    expected = torch.cat(list(values.values())).to(torch.bfloat16)
    assert torch.equal(stacked.cpu(), expected)
    assert torch.equal(alone.cpu(), values["other"].to(torch.bfloat16))


def test_memory_is_that_of_the_weights(tmp_path: Path) -> None:
    write(tmp_path, torch.float32)
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    with SafetensorsWeights(tmp_path, torch.float32, CUDA, progress=False) as weights:
        stacked = weights.take_stacked(SHAPES)
    assert torch.cuda.max_memory_allocated() - before < stacked.nbytes + (1 << 20)


def test_a_file_that_ends_early(tmp_path: Path) -> None:
    write(tmp_path, torch.float32)
    with SafetensorsWeights(tmp_path, torch.float32, CUDA, progress=False) as weights:
        with (tmp_path / "large.safetensors").open("rb+") as file:
            file.truncate(1 << 20)
        with pytest.raises(StartupError, match="ends before its tensors do"):
            weights.take("large", SHAPES["large"])
