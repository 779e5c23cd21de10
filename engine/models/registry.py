"""From a model directory to a model that runs."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from engine.gpu_memory import gib
from engine.models.bert import BertModel
from engine.models.causal_lm import CausalLM
from engine.models.config import ModelConfig
from engine.models.encoder_config import ENCODER_ARCHITECTURES, EncoderConfig
from engine.models.llama import llama
from engine.models.mistral import mistral
from engine.models.qwen2 import qwen2
from engine.models.qwen3 import qwen3
from engine.weights.source import DummyWeights, LinearFormat, SafetensorsWeights, WeightSource
from kernels.fp8_linear import multiplies_fp8
from protocol.errors import StartupError

ARCHITECTURES: dict[str, Callable[[ModelConfig, WeightSource], CausalLM]] = {
    "LlamaForCausalLM": llama,
    "MistralForCausalLM": mistral,
    "Qwen2ForCausalLM": qwen2,
    "Qwen3ForCausalLM": qwen3,
}


def build_model(config: ModelConfig, weights: WeightSource) -> CausalLM:
    """Raises StartupError for an architecture that isn't served or weights that don't fit."""
    architecture = ARCHITECTURES.get(config.architecture)
    if architecture is None:
        raise StartupError(
            f"config.json names architecture {config.architecture!r}; "
            f"served are {', '.join(ARCHITECTURES)}, and as encoders "
            f"{', '.join(ENCODER_ARCHITECTURES)}."
        )
    return architecture(config, weights)


def load_model(
    config: ModelConfig,
    model_dir: Path,
    *,
    dtype: torch.dtype,
    device: torch.device,
    load_format: str = "auto",
    fp8_products: bool | None = None,
    progress: bool = False,
) -> CausalLM:
    """The model with the directory's weights, or random ones if `load_format` is "dummy".

    `fp8_products` overrules what the device can do: on a CPU quantized layers then compute as they
    would on a GPU, slowly. Raises StartupError if the weights don't fit on the device, too.
    """
    format_ = LinearFormat(
        config.quantization,
        multiplies_fp8(device, dtype) if fp8_products is None else fp8_products,
    )
    with _fitting(device):
        if load_format == "dummy":
            return build_model(config, DummyWeights(dtype, device, linear_format=format_))
        with SafetensorsWeights(
            model_dir, dtype, device, linear_format=format_, progress=progress
        ) as weights:
            return build_model(config, weights)


def load_encoder(
    config: EncoderConfig,
    model_dir: Path,
    *,
    dtype: torch.dtype,
    device: torch.device,
    load_format: str = "auto",
    progress: bool = False,
) -> BertModel:
    """As `load_model`, for a model that only embeds."""
    with _fitting(device):
        if load_format == "dummy":
            return BertModel(config, DummyWeights(dtype, device))
        with SafetensorsWeights(model_dir, dtype, device, progress=progress) as weights:
            return BertModel(config, weights)


@contextmanager
def _fitting(device: torch.device) -> Iterator[None]:
    """Raises StartupError if what is loaded inside doesn't fit on the GPU."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        free_bytes, total_bytes = torch.cuda.mem_get_info(device)
        loaded_bytes = torch.cuda.memory_allocated(device)
        raise StartupError(
            f"The weights do not fit on the GPU: after {gib(loaded_bytes)} of them, "
            f"{gib(free_bytes)} of {gib(total_bytes)} are free. End what else uses the GPU, or "
            "serve a smaller model."
        ) from error
