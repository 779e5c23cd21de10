"""Products on a part of a GPU: wrong ones are found, right ones pass."""

import pytest
import torch
from test_runner_batch import model_config
from torch import Tensor

from engine import product_check
from engine.models.config import ModelConfig
from protocol.errors import StartupError

CPU = torch.device("cpu")


@pytest.fixture
def config(tmp_path) -> ModelConfig:
    return model_config(tmp_path)


def lost_tile(x: Tensor, weight: Tensor) -> Tensor:
    """As it was seen: some tiles of the result aren't the sums, and only for some sizes."""
    out = torch.nn.functional.linear(x, weight)
    if len(x) == 300:
        out[256:, -16:] = float("nan")
    return out


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_what_is_right_passes(config: ModelConfig, dtype: torch.dtype) -> None:
    for product in (
        torch.nn.functional.linear,
        product_check._added_product,
        product_check._fp8_product,
        product_check._added_fp8_product,
        product_check._unscaled_fp8_product,
    ):
        shapes = product_check._layer_shapes(config)
        assert product_check.wrong_product(shapes, product, dtype, CPU) is None


def test_a_wrong_tile_is_found(config: ModelConfig) -> None:
    shapes = product_check._layer_shapes(config)
    wrong = product_check.wrong_product(shapes, lost_tile, torch.bfloat16, CPU)
    assert wrong is not None
    assert wrong.startswith("300 x ")


def test_it_asks_only_where_a_part_is_used(
    config: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def check(percentage: str | None) -> None:
        name = "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE"
        if percentage is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, percentage)
        device = torch.device("cuda")
        product_check.check_products_under_mps(config, torch.bfloat16, device)

    def found(*_: object) -> str:
        return "300 x 32 by 96"

    monkeypatch.setattr(product_check, "wrong_product", found)
    check(None)
    check("100")
    with pytest.raises(StartupError, match=r"With 70 % .* are wrong \(300 x 32 by 96\); use all"):
        check("70")
