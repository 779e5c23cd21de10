"""Times layers of a decode step in fp8: products that quantize on their way, or after a kernel, or
all products of a layer as one kernel.

    python -m benchmarks.gpu.decode_layer [--layers 8] [--asked 3 4]
        [--out benchmarks/results/FILE.json]

Layers of Llama-3.1-8B's shape with random weights, more of them than the L2 cache holds, run one
behind the other in a CUDA graph over a pool of noise. Variants take turns: products of up to so
many tokens quantize their inputs, and gate their outputs, themselves; "joined" is one kernel from
attention's output to the next layer's queries (`kernels.layer`), for numbers of tokens, too, that
don't take it, and "joined, 4 asked" has so many stages of weights on their way. Figures are
microseconds a layer, the median of all replays.

What the layers add to the residual stream is compared with torch's in float32 first, from the same
weights, keys and values of 8 bits; an error over its bound ends the run. The reference doesn't
quantize inputs, so the error is what that costs in all layers. Nearly all of the sum is the MLPs';
`benchmarks.gpu.decode_attention` looks at attention alone.
"""

import argparse
import gc
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks.commit import current_commit
from benchmarks.gpu.correctness import Check
from benchmarks.gpu.engine import llama_config
from benchmarks.gpu.kernels import BLOCK_SIZE, HEAD_DIM, KV_HEADS, make_batch
from benchmarks.gpu.llama_8b import LLAMA_8B
from engine.layers import attention, projection
from engine.layers.attention import AttentionOptions
from engine.layers.decoder import DecoderLayer
from engine.layers.rope import rope_table
from engine.weights.source import DummyWeights, LinearFormat
from kernels.activation import silu_and_mul_reference
from kernels.attention import AttentionBatch, paged_attention_reference, prepare
from kernels.fp8 import FP8
from kernels.fp8_linear import Fp8Linear
from kernels.gpu import fp8_linear, linear_tiles
from kernels.gpu.hopper import layer_shapes
from kernels.gpu.sizes import ceil_div
from kernels.norm import rms_norm_reference
from kernels.rope import rope_and_store_kv_reference
from kernels.turning import turned, turns

HIDDEN = LLAMA_8B["hidden_size"]
BATCHES = (1, 2, 4, 8, 16, 17, 24, 32, 48, 64)
CONTEXT = 1170
FEW_TOKENS = (0, 16, 32)
JOINED = "joined"
# Inputs of 8 bits cost a layer 4.8e-2 of what it adds, and layers err in ways of their own.
LAYER_ERROR = 8e-2
NUM_WARM_UP, NUM_ROUNDS, NUM_REPLAYS = 3, 7, 12


class Layers:
    """Decoder layers, and keys and values of noise for the largest batch."""

    def __init__(self, num_layers: int) -> None:
        with TemporaryDirectory() as model_dir:
            config = llama_config(Path(model_dir), num_layers, "fp8")
        device = torch.device("cuda")
        linear_format = LinearFormat(config.quantization, multiplies_fp8=True)
        weights = DummyWeights(torch.bfloat16, device, linear_format=linear_format)
        options = AttentionOptions()
        self._layers = [
            DecoderLayer(config, layer, weights, attention=options) for layer in range(num_layers)
        ]
        self._cos_sin = rope_table(config.rope, 2 * CONTEXT, device)
        self.num_layers = num_layers

    def make_pool(self, num_seqs: int) -> Tensor:
        num_blocks = num_seqs * ceil_div(CONTEXT, BLOCK_SIZE)
        layer = (2, KV_HEADS, BLOCK_SIZE, HEAD_DIM)
        shape = (num_blocks, self.num_layers, *layer)
        pool = torch.empty(shape, dtype=FP8, device="cuda")
        noise = torch.randn((num_blocks, *layer), dtype=torch.bfloat16, device="cuda")
        for layer_index in range(self.num_layers):
            pool[:, layer_index] = noise.roll(layer_index, 0).to(FP8)
        return pool

    def joins_products(self, num_tokens: int) -> bool:
        first, second = self._layers[:2]
        return first.joins_products(second, num_tokens, torch.bfloat16)

    def _forward_joined(self, stream: Tensor, batch: AttentionBatch, pool: Tensor) -> None:
        projected: Tensor | None
        projected, stream = self._layers[0].project(None, stream)
        for layer, following in zip(self._layers, [*self._layers[1:], None], strict=True):
            assert projected is not None
            projected = layer.forward_joined(
                projected, stream, self._cos_sin, batch, pool, following
            )

    def forward(
        self, stream: Tensor, batch: AttentionBatch, pool: Tensor, *, joined: bool = False
    ) -> None:
        """Adds all layers' outputs to the residual `stream` [num_tokens, HIDDEN]."""
        output, residual = None, stream
        if joined:
            self._forward_joined(stream, batch, pool)
            return
        for layer in self._layers:
            output, residual = layer.forward(output, residual, self._cos_sin, batch, pool)
        if output is not None:
            residual = residual + output
        if residual is not stream:
            stream.copy_(residual)


class Captured:
    """A forward pass in a graph, from the same input each time."""

    def __init__(
        self, layers: Layers, batch: AttentionBatch, pool: Tensor, start: Tensor, *, joined: bool
    ) -> None:
        self.stream = torch.empty_like(start)
        prepare(batch, pool, [None])

        def run() -> None:
            self.stream.copy_(start)
            layers.forward(self.stream, batch, pool, joined=joined)

        torch.cuda.synchronize()
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            run()
        torch.cuda.synchronize()
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            run()

    def times_us(self, num: int) -> list[float]:
        events: list[Any] = []
        for _ in range(num):
            pair = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            pair[0].record()
            self._graph.replay()
            pair[1].record()
            events.append(pair)
        torch.cuda.synchronize()
        return [1e3 * start.elapsed_time(end) for start, end in events]


def added_reference(layers: Layers, start: Tensor, batch: AttentionBatch, pool: Tensor) -> Tensor:
    """What the layers add to `start`, with each kernel's place taken by torch in float32."""
    products = {
        "add_rms_norm_fp8": _norm,
        "fp8_linear": _product,
        "add_fp8_linear": lambda *_: False,
        "gated_fp8_linear": lambda x, packed, **_: silu_and_mul_reference(_product(x, packed)),
    }
    stream = start.float()
    with (
        mock.patch.multiple(projection, **products),
        mock.patch.object(attention, "rotate_and_attend", _attend),
    ):
        layers.forward(stream, batch, pool)
    return stream - start.float()


def _norm(
    x: Tensor | None, residual: Tensor, weight: Tensor, eps: float, **_: object
) -> tuple[Tensor, Tensor]:
    residual = residual if x is None else residual + x
    return rms_norm_reference(residual, weight.float(), eps), residual


def _product(x: Tensor, packed: Fp8Linear, **_: object) -> Tensor:
    return x @ packed.weight.dequantized(torch.float32).T


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos_sin: Tensor,
    batch: AttentionBatch,
    pool: Tensor,
    layer: int,
    *,
    scale: float,
    **_: object,
) -> Tensor:
    of_layer = pool[:, layer : layer + 1].float()
    if turns(pool, cos_sin.shape[1]):
        of_layer[:, :, 0] = turned(of_layer[:, :, 0])
    rope_and_store_kv_reference(q, k, v, cos_sin, batch, of_layer, 0)
    return paged_attention_reference(q, of_layer, 0, batch, scale=scale)


def decode_batch(num_seqs: int) -> AttentionBatch:
    batch = make_batch(num_seqs, 1, CONTEXT)
    last = batch.block_tables[:, (CONTEXT - 1) // BLOCK_SIZE].long() * BLOCK_SIZE
    return replace(
        batch,
        slots=last + (CONTEXT - 1) % BLOCK_SIZE,
        positions=torch.full((num_seqs,), CONTEXT - 1, device="cuda", dtype=torch.int64),
    )


@contextmanager
def joined_with(asked: int | None) -> Iterator[None]:
    """Layers as one kernel for any tokens, with so many stages of weights on their way, or as many
    as usual."""
    changed: dict[str, Any] = {"least_tokens": lambda _: 1}
    if asked is not None:
        changed["stages_asked"] = lambda _: asked
    with mock.patch.multiple(layer_shapes, **changed):
        yield


def bench(layers: Layers, pool: Tensor, num_seqs: int, asked: list[int]) -> dict[str, Any]:
    torch.manual_seed(0)
    batch = decode_batch(num_seqs)
    start = torch.randn(num_seqs, HIDDEN, dtype=torch.bfloat16, device="cuda")
    captured: dict[int | str, Captured] = {}
    for few in FEW_TOKENS:
        with (
            mock.patch.object(fp8_linear, "few_fp8_tokens", return_value=few),
            mock.patch.object(linear_tiles, "few_fp8_tokens", return_value=few),
        ):
            captured[few] = Captured(layers, batch, pool, start, joined=False)
    for num_asked in (None, *asked):
        with joined_with(num_asked):
            if layers.joins_products(num_seqs):
                which = JOINED if num_asked is None else f"{JOINED}, {num_asked} asked"
                captured[which] = Captured(layers, batch, pool, start, joined=True)
    expected = added_reference(layers, start, batch, pool)
    bound = LAYER_ERROR * layers.num_layers**0.5
    check = Check(f"a batch of {num_seqs}", expected, bound=bound)
    times: dict[int | str, list[float]] = {variant: [] for variant in captured}
    errors: dict[int | str, float] = {}
    for variant, replayed in captured.items():
        replayed.times_us(NUM_WARM_UP)
        errors[variant] = check(str(variant), replayed.stream.float() - start.float())
    for _ in range(NUM_ROUNDS):
        for variant, replayed in captured.items():
            times[variant] += replayed.times_us(NUM_REPLAYS)
    us = {which: round(median(all_us) / layers.num_layers, 2) for which, all_us in times.items()}
    return {"batch": num_seqs, "us_a_layer": us, "errors": errors}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--asked", type=int, nargs="*", default=[])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--commit", default=current_commit(), help="where the machine has no git")
    args = parser.parse_args()
    torch.set_grad_enabled(False)
    layers = Layers(args.layers)
    pool = layers.make_pool(max(BATCHES))
    # Each capture of a graph collects garbage: what is here by now is none.
    gc.freeze()
    results: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"),
        "commit": args.commit,
        "card": torch.cuda.get_device_name(),
        "layers": args.layers,
        "context": CONTEXT,
        "rows": [],
    }
    for num_seqs in BATCHES:
        results["rows"].append(bench(layers, pool, num_seqs, args.asked))
        print(results["rows"][-1], flush=True)
    if args.out:
        args.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
