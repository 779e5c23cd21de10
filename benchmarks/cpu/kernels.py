"""Times every CPU kernel and whole steps in SmolLM2-135M's shapes, against torch and the hardware.

    python -m benchmarks.cpu.kernels [--threads 2] [--out benchmarks/results/cpu-kernels.json]

All sides of a comparison take turns in one loop, so that a noisy machine is noisy for each. A step
uses weights of all 30 layers: nothing stays in the caches that wouldn't when serving.
"""

import argparse
import ctypes
import json
import os
import platform
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from kernels.activation import silu_and_mul, silu_and_mul_reference
from kernels.attention import AttentionBatch, paged_attention, paged_attention_reference
from kernels.linear import PackedLinear, linear, pack_linear
from kernels.norm import add_rms_norm, add_rms_norm_reference, rms_norm, rms_norm_reference
from kernels.rope import rope_and_store_kv, rope_and_store_kv_reference

LAYERS, HIDDEN, HEADS, KV_HEADS, HEAD_DIM, INTERMEDIATE, VOCAB = 30, 576, 9, 3, 64, 1536, 49152
QKV = (HEADS + 2 * KV_HEADS) * HEAD_DIM
LAYER_SHAPES = {
    "qkv": (QKV, HIDDEN),
    "o": (HIDDEN, HEADS * HEAD_DIM),
    "gate_up": (2 * INTERMEDIATE, HIDDEN),
    "down": (HIDDEN, INTERMEDIATE),
}
BLOCK_SIZE = 16
DTYPE = torch.bfloat16
MAX_LOGIT_ROWS = 32

Run = Callable[[], object]


@dataclass(frozen=True)
class Ceiling:
    read_gb_per_s: float
    bf16_gflop_per_s: float


@dataclass(frozen=True)
class Workload:
    """`num_seqs` sequences with `num_queries` new tokens each, of `kv_len` in all."""

    num_seqs: int
    num_queries: int
    kv_len: int

    @property
    def num_tokens(self) -> int:
        return self.num_seqs * self.num_queries

    @property
    def num_logit_rows(self) -> int:
        return self.num_seqs

    def name(self) -> str:
        return f"{self.num_seqs}x{self.num_queries}@{self.kv_len}"


WORKLOADS = (
    Workload(1, 1, 128),
    Workload(1, 1, 1500),
    Workload(8, 1, 128),
    Workload(8, 1, 1500),
    Workload(32, 1, 128),
    Workload(32, 1, 1500),
    Workload(1, 512, 512),
    Workload(1, 512, 1536),
)


def seconds(runs: dict[str, Run], *, budget_s: float) -> dict[str, float]:
    """Median seconds of each, taking turns; at least 5 turns."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    begin = time.perf_counter()
    while time.perf_counter() - begin < budget_s or len(times[next(iter(runs))]) < 5:
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    return {name: median(taken) for name, taken in times.items()}


def measure_ceiling(threads: int) -> Ceiling:
    source = Path(__file__).with_name("kernels_ceiling.c")
    with tempfile.TemporaryDirectory() as directory:
        target = Path(directory) / "ceiling.so"
        flags = ["-O3", "-march=native", "-fopenmp", "-shared", "-fPIC"]
        subprocess.run(["cc", *flags, str(source), "-o", str(target)], check=True)
        library = ctypes.CDLL(str(target))
    memory = torch.ones(1 << 29, dtype=torch.uint8)
    rounds = 20_000_000

    def read() -> None:
        library.read_all(
            ctypes.c_void_p(memory.data_ptr()), ctypes.c_int64(memory.numel()), threads
        )

    taken = seconds(
        {"read": read, "multiply": lambda: library.multiply_all(ctypes.c_int64(rounds), threads)},
        budget_s=3,
    )
    return Ceiling(
        memory.numel() / taken["read"] / 1e9, rounds * threads * 12 * 64 / taken["multiply"] / 1e9
    )


class Model:
    """All weights of the model, in each of the layouts compared."""

    def __init__(self) -> None:
        shapes = [shape for _ in range(LAYERS) for shape in LAYER_SHAPES.values()]
        self.plain = [
            (torch.randn(shape) / shape[1] ** 0.5).to(DTYPE) for shape in (*shapes, (VOCAB, HIDDEN))
        ]
        self.packed = [pack_linear(weight) for weight in self.plain]
        self.norm = torch.ones(HIDDEN, dtype=DTYPE)
        angles = torch.outer(torch.arange(4096.0), 1e5 ** -torch.linspace(0, 1, HEAD_DIM // 2))
        self.cos_sin = torch.cat((angles.cos(), angles.sin()), -1)

    def prepacked(self, num_tokens: int) -> list[Tensor]:
        return [
            torch.ops.mkldnn._reorder_linear_weight(weight, num_tokens)  # noqa: SLF001
            for weight in self.plain
        ]


def make_batch(work: Workload) -> tuple[AttentionBatch, Tensor]:
    """The batch and a pool for it, its blocks scattered as after some time of serving."""
    blocks = -(-work.kv_len // BLOCK_SIZE)
    tables = torch.randperm(work.num_seqs * blocks, dtype=torch.int32).view(work.num_seqs, blocks)
    positions = torch.arange(work.kv_len - work.num_queries, work.kv_len)
    slots = tables[:, positions // BLOCK_SIZE].long() * BLOCK_SIZE + positions % BLOCK_SIZE
    pool = torch.randn(
        (work.num_seqs * blocks, LAYERS, 2, KV_HEADS, BLOCK_SIZE, HEAD_DIM), dtype=DTYPE
    )
    starts = torch.arange(0, work.num_tokens + 1, work.num_queries, dtype=torch.int32)
    batch = AttentionBatch(
        query_starts=starts,
        kv_lens=torch.full((work.num_seqs,), work.kv_len, dtype=torch.int32),
        block_tables=tables,
        slots=slots.flatten(),
        positions=positions.repeat(work.num_seqs),
        max_query_len=work.num_queries,
        max_kv_len=work.kv_len,
        num_seqs=work.num_seqs,
    )
    return batch, pool


def linears(model: Model, work: Workload) -> dict[str, Run]:
    """The step's linear layers alone, three ways."""
    inputs = {k: torch.randn(work.num_tokens, k).to(DTYPE) for k in (HIDDEN, INTERMEDIATE)}
    logits_input = inputs[HIDDEN][: work.num_logit_rows]
    prepacked = model.prepacked(work.num_tokens)

    def x(index: int) -> Tensor:
        weight = model.plain[index]
        return logits_input if weight.shape[0] == VOCAB else inputs[weight.shape[1]]

    indices = range(len(model.plain))
    return {
        "ours": lambda: [linear(x(i), model.packed[i]) for i in indices],
        "F.linear": lambda: [torch.nn.functional.linear(x(i), model.plain[i]) for i in indices],
        "oneDNN prepacked": lambda: [
            torch.ops.mkldnn._linear_pointwise(x(i), prepacked[i], None, "none", [], "")  # noqa: SLF001
            for i in indices
        ],
    }


def step(model: Model, work: Workload) -> dict[str, Run]:
    """All kernels of a step, ours and torch's."""
    batch, pool = make_batch(work)
    x0 = torch.randn(work.num_tokens, HIDDEN).to(DTYPE)
    last_rows = batch.query_starts[1:].long() - 1

    def run(
        multiply: Callable[[Tensor, int], Tensor],
        ops: tuple[Callable, Callable, Callable, Callable, Callable],
    ) -> Tensor:
        norm, add_norm, activate, rope, attend = ops
        residual = x0.clone()
        hidden = norm(residual, model.norm, 1e-5)
        for layer in range(LAYERS):
            heads = multiply(hidden, 4 * layer).unflatten(-1, (-1, HEAD_DIM))
            q, k, v = heads.split([HEADS, KV_HEADS, KV_HEADS], dim=1)
            rope(q, k, v, model.cos_sin, batch, pool, layer)
            attended = attend(q, pool, layer, batch, scale=HEAD_DIM**-0.5)
            hidden = multiply(attended.flatten(1), 4 * layer + 1)
            hidden, residual = add_norm(hidden, residual, model.norm, 1e-5)
            hidden = multiply(activate(multiply(hidden, 4 * layer + 2)), 4 * layer + 3)
            hidden, residual = add_norm(hidden, residual, model.norm, 1e-5)
        return multiply(hidden[last_rows], 4 * LAYERS)

    native = (rms_norm, add_rms_norm, silu_and_mul, rope_and_store_kv, paged_attention)
    reference = (
        rms_norm_reference,
        add_rms_norm_reference,
        silu_and_mul_reference,
        rope_and_store_kv_reference,
        paged_attention_reference,
    )
    return {
        "ours": lambda: run(lambda x, i: linear(x, model.packed[i]), native),
        "torch": lambda: run(lambda x, i: torch.nn.functional.linear(x, model.plain[i]), reference),
    }


def layer_ops(model: Model, work: Workload) -> dict[str, tuple[Run, float, float]]:
    """Each op over all layers: run, bytes it must move, FLOPs it must do."""
    batch, pool = make_batch(work)
    m = work.num_tokens
    hidden, wide = torch.randn(m, HIDDEN).to(DTYPE), torch.randn(m, 2 * INTERMEDIATE).to(DTYPE)
    inputs = {HIDDEN: hidden, INTERMEDIATE: torch.randn(m, INTERMEDIATE).to(DTYPE)}
    heads = torch.randn(m, HEADS + 2 * KV_HEADS, HEAD_DIM).to(DTYPE)
    q, k, v = heads.split([HEADS, KV_HEADS, KV_HEADS], dim=1)
    ops: dict[str, tuple[Run, float, float]] = {}

    def linear_op(packed: list[PackedLinear], x: Tensor) -> tuple[Run, float, float]:
        n, inner = packed[0].out_features, packed[0].in_features
        flop = 2.0 * len(packed) * x.shape[0] * n * inner
        bytes_moved = 2.0 * len(packed) * (n * inner + x.shape[0] * (n + inner))
        return lambda: [linear(x, p) for p in packed], bytes_moved, flop

    for i, (name, shape) in enumerate(LAYER_SHAPES.items()):
        ops[name] = linear_op(model.packed[i : 4 * LAYERS : 4], inputs[shape[1]])
    ops["lm_head"] = linear_op(model.packed[-1:], hidden[: work.num_logit_rows])
    seen = work.num_queries * (2 * work.kv_len - work.num_queries + 1) / 2 * work.num_seqs
    kv_bytes = 2.0 * LAYERS * work.num_seqs * work.kv_len * 2 * KV_HEADS * HEAD_DIM
    ops["attention"] = (
        lambda: [paged_attention(q, pool, i, batch, scale=0.125) for i in range(LAYERS)],
        kv_bytes + 4.0 * LAYERS * m * HIDDEN,
        4.0 * LAYERS * seen * HEADS * HEAD_DIM,
    )
    ops["rope_and_store_kv"] = (
        lambda: [rope_and_store_kv(q, k, v, model.cos_sin, batch, pool, i) for i in range(LAYERS)],
        4.0 * LAYERS * m * QKV,
        0.0,
    )
    ops["add_rms_norm"] = (
        lambda: [add_rms_norm(hidden, hidden, model.norm, 1e-5) for _ in range(2 * LAYERS)],
        16.0 * LAYERS * m * HIDDEN,
        0.0,
    )
    ops["silu_and_mul"] = (
        lambda: [silu_and_mul(wide) for _ in range(LAYERS)],
        6.0 * LAYERS * m * INTERMEDIATE,
        0.0,
    )
    return ops


def measure(model: Model, work: Workload, ceiling: Ceiling, budget_s: float) -> dict[str, object]:
    weights_bytes = 2.0 * sum(weight.numel() for weight in model.plain)
    layer_weights = sum(weight.numel() for weight in model.plain[:-1])
    flop = 2.0 * (work.num_tokens * layer_weights + work.num_logit_rows * VOCAB * HIDDEN)
    floor_s = max(
        weights_bytes / ceiling.read_gb_per_s / 1e9, flop / ceiling.bf16_gflop_per_s / 1e9
    )
    print(f"\n{work.name()}: {work.num_tokens} tokens; floor of the linears {floor_s * 1e3:.1f} ms")
    only_linears = seconds(linears(model, work), budget_s=budget_s)
    whole = seconds(step(model, work), budget_s=budget_s)
    for kind, taken in (("linears", only_linears), ("step", whole)):
        for name, taken_s in taken.items():
            print(
                f"  {kind:8} {name:18} {taken_s * 1e3:8.2f} ms {taken['ours'] / taken_s:5.0%} "
                f"{weights_bytes / taken_s / 1e9:6.1f} GB/s {flop / taken_s / 1e9:6.0f} GFLOP/s "
                f"{work.num_tokens / taken_s:7.0f} tok/s  floor/time {floor_s / taken_s:4.0%}"
            )
    each: dict[str, object] = {}
    for name, (run, op_bytes, op_flop) in layer_ops(model, work).items():
        taken_s = seconds({"ours": run}, budget_s=budget_s / 8)["ours"]
        op_floor_s = max(
            op_bytes / ceiling.read_gb_per_s / 1e9, op_flop / ceiling.bf16_gflop_per_s / 1e9
        )
        each[name] = {
            "ms": taken_s * 1e3,
            "gb_per_s": op_bytes / taken_s / 1e9,
            "gflop_per_s": op_flop / taken_s / 1e9,
            "floor_fraction": op_floor_s / taken_s,
        }
        print(
            f"    {name:18} {taken_s * 1e3:8.2f} ms {op_bytes / taken_s / 1e9:7.1f} GB/s "
            f"{op_flop / taken_s / 1e9:7.0f} GFLOP/s  floor/time {op_floor_s / taken_s:4.0%}"
        )
    return {
        "workload": vars(work),
        "floor_ms": floor_s * 1e3,
        "linears_ms": {name: taken_s * 1e3 for name, taken_s in only_linears.items()},
        "step_ms": {name: taken_s * 1e3 for name, taken_s in whole.items()},
        "ops": each,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--budget-s", type=float, default=4.0, help="for each comparison")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/cpu-kernels.json"))
    parser.add_argument("--only", help="workloads whose name contains this, e.g. 1x1@")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    ceiling = measure_ceiling(options.threads)
    print(f"ceiling: {ceiling.read_gb_per_s:.1f} GB/s, {ceiling.bf16_gflop_per_s:.0f} GFLOP/s")
    model = Model()
    works = [work for work in WORKLOADS if not options.only or options.only in work.name()]
    results = [measure(model, work, ceiling, options.budget_s) for work in works]
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True
    ).stdout.strip()
    report = {
        "commit": commit,
        "date": time.strftime("%Y-%m-%d"),
        "cpu": cpu_name(),
        "threads": options.threads,
        "torch": torch.__version__,
        "load_average": os.getloadavg()[0],
        "gomp_spincount": os.environ.get("GOMP_SPINCOUNT"),
        "seed": 0,
        "ceiling": vars(ceiling),
        "results": results,
    }
    if not options.only:
        options.out.write_text(json.dumps(report, indent=1) + "\n")


def cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":")[1].strip()
    return platform.processor()


if __name__ == "__main__":
    main()
