"""Which products' inputs cost how much when they have 8 bits (e4m3), with the built-in model.

    python -m benchmarks.quality.fp8_inputs [--tokens 16384] [--variants NAME ...] [--out FILE.json]

Perplexity of the text that `fp8_perplexity` reads, on a CPU, by the products that `kernels` have as
references. Weights are of 8 bits throughout. A variant quantizes the inputs of some products of
each layer: with a scale for each token by its largest number, or for each 128 of its channels; or
with the one of eight scales, or of two, that leaves the least squared error. The last is served.
"""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks.quality.fp8_perplexity import WINDOW, perplexity, read_windows
from benchmarks.quality.rows import add_row, read_arguments, wanted, write_rows
from engine.models.config import read_model_config
from engine.models.registry import load_model
from engine.tokenizer import Tokenizer
from engine.weights.model_dir import resolve_model
from kernels.fp8 import Fp8Rows, quantize_rows_reference

# A layer's products in their order, in which it quantizes.
PRODUCTS = ("qkv", "output", "gate and up", "down")
BLOCK = 128


def exact(x: Tensor) -> Fp8Rows:
    """Not of 8 bits, but in their place: products take any numbers."""
    return Fp8Rows(x.float(), torch.ones(len(x)))


def by_largest(x: Tensor) -> Fp8Rows:
    return quantize_rows_reference(x, num_tried=1)


def by_block(x: Tensor) -> Fp8Rows:
    padded = torch.nn.functional.pad(x, (0, -x.shape[1] % BLOCK)).unflatten(1, (-1, BLOCK))
    blocks = by_largest(padded.flatten(0, 1)).dequantized(torch.float32)
    return exact(blocks.view(len(x), -1)[:, : x.shape[1]])


def by_best_scale(x: Tensor) -> Fp8Rows:
    return quantize_rows_reference(x, num_tried=8)


@dataclass(frozen=True, slots=True)
class Variant:
    name: str
    products: tuple[str, ...]
    quantize: Callable[[Tensor], Fp8Rows] = by_largest


VARIANTS = (
    Variant("none", ()),
    *(Variant(product, (product,)) for product in PRODUCTS),
    Variant("all", PRODUCTS),
    Variant("all but down", PRODUCTS[:3]),
    Variant("all, by blocks of 128", PRODUCTS, by_block),
    Variant("all, by the best of eight scales", PRODUCTS, by_best_scale),
    Variant("all, by the better of two scales", PRODUCTS, quantize_rows_reference),
)


class Quantizer:
    """Stands in for `quantize_rows_reference`."""

    def __init__(self, num_layers: int) -> None:
        self.variant = VARIANTS[0]
        self._num_layers = num_layers
        self.num_calls = 0

    def __call__(self, x: Tensor, scale: Tensor | None = None) -> Fp8Rows:
        assert scale is None
        product = PRODUCTS[self.num_calls % len(PRODUCTS)]
        self.num_calls += 1
        return self.variant.quantize(x) if product in self.variant.products else exact(x)

    def check(self, num_windows: int) -> None:
        assert self.num_calls == num_windows * self._num_layers * len(PRODUCTS)
        self.num_calls = 0


def main() -> None:
    args = read_arguments(__doc__, VARIANTS, num_tokens=16384)
    model_dir = resolve_model(None)
    config = read_model_config(model_dir)
    model = load_model(
        config.quantized("fp8"),
        model_dir,
        dtype=torch.bfloat16,
        device=torch.device("cpu"),
        fp8_products=True,
    )
    windows = list(read_windows(Tokenizer.from_dir(model_dir), args.tokens))
    quantizer = Quantizer(config.num_layers)
    rows: list[dict[str, Any]] = []
    with ExitStack() as patches:
        for module in ("kernels.norm", "kernels.activation", "kernels.fp8"):
            patches.enter_context(mock.patch(f"{module}.quantize_rows_reference", quantizer))
        for quantizer.variant in wanted(VARIANTS, args.variants):
            found = perplexity(model, windows)
            quantizer.check(len(windows))
            add_row(rows, "inputs_of_8_bits", quantizer.variant.name, found)
    write_rows(args.out, rows, len(windows) * (WINDOW - 1))


if __name__ == "__main__":
    main()
