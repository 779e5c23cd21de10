"""Times a layer's products by one kernel, beside kernels of their own.

    python -m benchmarks.gpu.layer_products [--layers 8] [--out benchmarks/results/FILE.json]

Llama-3.1-8B's shape, random weights of 8 bits, a step of one token a sequence. In a CUDA graph some
layers follow each other, more of them than the L2 cache holds, without attention, whose output is
noise. Both results are compared with torch's first, from the same quantized weights, layer by
layer; an error over its bound ends the run. Figures are microseconds a layer, the least of some
replays, and the GB/s at which weights were read.
"""

import argparse
import functools
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.commit import current_commit
from benchmarks.gpu.correctness import QUANTIZED_ERROR, Check
from benchmarks.gpu.graph_time import captured, replay_s
from benchmarks.gpu.llama_8b import LLAMA_8B
from kernels.activation import silu_and_mul_reference
from kernels.fp8 import Fp8Rows, quantize_rows
from kernels.fp8_linear import Fp8Linear, add_fp8_linear, fp8_linear, gated_fp8_linear
from kernels.gpu.hopper.layer import layer_products
from kernels.gpu.hopper.layer_shapes import tile_for
from kernels.layer import LayerWeights, NextWeights
from kernels.norm import add_rms_norm_fp8, rms_norm_reference

DTYPE = torch.bfloat16
HIDDEN, INTERMEDIATE = LLAMA_8B["hidden_size"], LLAMA_8B["intermediate_size"]
HEAD_DIM = HIDDEN // LLAMA_8B["num_attention_heads"]
QKV = HIDDEN + 2 * LLAMA_8B["num_key_value_heads"] * HEAD_DIM
BATCHES = (1, 4, 16, 32, 64)
EPS = 1e-5
# Products' inputs are quantized twice on the way to either result.
ERROR = 1.5 * QUANTIZED_ERROR
NUM_ROUNDS, NUM_REPLAYS = 5, 6
Layer = tuple[LayerWeights, NextWeights]
Run = Callable[[Tensor, Tensor, LayerWeights, NextWeights], Tensor | None]
# What differs from the tile that is used.
VARIANTS: dict[str, dict[str, Any]] = {
    "joined": {},
    "8 warps": {"warps": 8},
    "1 stage on its way": {"asked": 1},
    "3 stages on their way": {"asked": 3},
}


@dataclass(frozen=True)
class Case:
    layers: list[Layer]
    attended: Tensor
    start: Tensor


def make_layers(num: int) -> list[Layer]:
    def weight(out_features: int, in_features: int) -> Fp8Rows:
        noise = torch.randn(out_features, in_features, dtype=DTYPE, device="cuda")
        return quantize_rows(noise * in_features**-0.5)

    def norm() -> Tensor:
        return 1 + 0.1 * torch.randn(HIDDEN, dtype=DTYPE, device="cuda")

    return [
        (
            LayerWeights(
                output=weight(HIDDEN, HIDDEN),
                norm=norm(),
                gate_up=weight(2 * INTERMEDIATE, HIDDEN),
                down=weight(HIDDEN, INTERMEDIATE),
            ),
            NextWeights(norm=norm(), qkv=weight(QKV, HIDDEN)),
        )
        for _ in range(num)
    ]


def apart(
    attended: Tensor, stream: Tensor, weights: LayerWeights, following: NextWeights
) -> Tensor:
    """As a decoder layer has it without the kernel."""
    output, gate_up, down, qkv = (
        Fp8Linear(rows, None, None)
        for rows in (weights.output, weights.gate_up, weights.down, following.qkv)
    )
    assert add_fp8_linear(attended, output, stream)
    rows, _ = add_rms_norm_fp8(None, stream, weights.norm, EPS, scale=None)
    assert add_fp8_linear(gated_fp8_linear(rows, gate_up, dtype=DTYPE, then=down), down, stream)
    rows, _ = add_rms_norm_fp8(None, stream, following.norm, EPS, scale=None)
    return fp8_linear(rows, qkv, dtype=DTYPE)


def reference(
    attended: Tensor, stream: Tensor, weights: LayerWeights, following: NextWeights
) -> tuple[Tensor, Tensor]:
    """Inputs aren't quantized."""

    def product(x: Tensor, weight: Fp8Rows) -> Tensor:
        return x @ weight.dequantized(torch.float32).T

    stream = stream.float() + product(attended.float(), weights.output)
    normed = rms_norm_reference(stream, weights.norm.float(), EPS)
    activated = silu_and_mul_reference(product(normed, weights.gate_up))
    stream = stream + product(activated, weights.down)
    normed = rms_norm_reference(stream, following.norm.float(), EPS)
    return stream, product(normed, following.qkv)


def check(name: str, run: Run, case: Case) -> dict[str, float]:
    weights, following = case.layers[0]
    stream, qkv = reference(case.attended, case.start, weights, following)
    label, start = f"batch {len(stream)}", case.start.float()
    added = Check(f"{label}, added", stream - start, bound=ERROR)
    projected = Check(f"{label}, qkv", qkv, bound=ERROR)
    # More than once: the kernel leaves its counters as the next call wants them.
    for _ in range(3):
        actual = case.start.clone()
        actual_qkv = run(case.attended, actual, weights, following)
        assert actual_qkv is not None
        added(name, actual.float() - start)
        projected(name, actual_qkv)
    return {"added": added.errors[name], "qkv": projected.errors[name]}


def bench(layers: list[LayerWeights], num_tokens: int) -> dict[str, Any]:
    torch.manual_seed(num_tokens)
    case = Case(
        layers,
        torch.randn(num_tokens, HIDDEN, dtype=DTYPE, device="cuda"),
        torch.randn(num_tokens, HIDDEN, dtype=DTYPE, device="cuda"),
    )
    tile = tile_for(*layers[0], num_tokens, DTYPE)
    if tile is None:
        raise SystemExit(f"products of {num_tokens} tokens aren't joined here")
    variants: dict[str, Run] = {"apart": apart}
    for name, options in VARIANTS.items():
        variants[name] = functools.partial(layer_products, eps=EPS, tile=replace(tile, **options))
    num_bytes = sum(
        rows.values.numel()
        for weights, following in layers
        for rows in (weights.output, weights.gate_up, weights.down, following.qkv)
    )
    errors, graphs = {}, {}
    for name, run in variants.items():
        errors[name] = check(name, run, case)
        stream = case.start.clone()
        graphs[name] = captured(
            [functools.partial(run, case.attended, stream, *layer) for layer in layers]
        )
    least = dict.fromkeys(graphs, float("inf"))
    for _ in range(NUM_ROUNDS):
        for name, graph in graphs.items():
            least[name] = min(least[name], replay_s(graph, NUM_REPLAYS))
    return {
        "batch": num_tokens,
        "us_a_layer": {n: round(1e6 * s / len(layers), 2) for n, s in least.items()},
        "gb_a_s": {n: round(num_bytes / s / 1e9) for n, s in least.items()},
        "errors": errors,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--batches", default=",".join(map(str, BATCHES)))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--commit", default=current_commit(), help="where the machine has no git")
    args = parser.parse_args()
    torch.set_grad_enabled(False)
    torch.manual_seed(0)
    layers = make_layers(args.layers)
    results: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"),
        "commit": args.commit,
        "card": torch.cuda.get_device_name(),
        "layers": args.layers,
        "variants": VARIANTS,
        "rows": [],
    }
    for num_tokens in map(int, args.batches.split(",")):
        results["rows"].append(bench(layers, num_tokens))
        row = results["rows"][-1]
        print(row["batch"], row["us_a_layer"], row["gb_a_s"], row["errors"], flush=True)
    if args.out:
        args.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
