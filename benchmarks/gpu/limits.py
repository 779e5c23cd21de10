"""What the card's ceilings allow for whole workloads: output tokens a second, at most.

    python -m benchmarks.gpu.limits [--ceilings benchmarks/results/gpu-engine.json]

Llama-3.1-8B's shape in bfloat16 and in fp8 (weights, inputs, keys and values; the head and prompts'
attention keep 16 bits). Prompts need their FLOPs, in the last layer those of keys and
values; each decode step reads all weights once for all that run, and their keys and values. The two
are counted one after the other.
"""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

from benchmarks.gpu.llama_8b import LLAMA_8B


@dataclass(frozen=True, slots=True)
class Ceilings:
    """TFLOP/s of a large product, and GB/s read, as measured on a card."""

    matmul_tflops: float
    fp8_tflops: float
    read_gb_per_s: float


@dataclass(frozen=True, slots=True)
class Workload:
    """Requests of one length, `num_streams` of which run at once."""

    num_requests: int
    prompt_len: int
    output_len: int
    num_streams: int

    @property
    def num_decode_steps(self) -> float:
        """Of the output tokens, the first of each request comes from its prompt's step."""
        return self.num_requests * (self.output_len - 1) / self.num_streams


WORKLOADS = {
    "128 x (4,096 in, 256 out)": Workload(128, 4096, 256, 128),
    "HTTP, 1,024 in, 256 out, 64 streams": Workload(256, 1024, 256, 64),
}


def limit_tokens_per_s(workload: Workload, ceilings: Ceilings, *, is_fp8: bool) -> float:
    """Output tokens a second."""
    prompts_s, reading_s = needed_s(workload, ceilings, is_fp8=is_fp8)
    return workload.num_requests * workload.output_len / (prompts_s + reading_s)


def needed_s(workload: Workload, ceilings: Ceilings, *, is_fp8: bool) -> tuple[float, float]:
    """Seconds for all prompts, and for all that decode steps read."""
    num_layers, hidden = LLAMA_8B["num_hidden_layers"], LLAMA_8B["hidden_size"]
    kv_size = LLAMA_8B["num_key_value_heads"] * LLAMA_8B["head_dim"]
    layer_weights = hidden * (2 * hidden + 2 * kv_size + 3 * LLAMA_8B["intermediate_size"])
    head_weights = hidden * LLAMA_8B["vocab_size"]
    prompt_weights = (num_layers - 1) * layer_weights + 2 * kv_size * hidden
    product_tflops = ceilings.fp8_tflops if is_fp8 else ceilings.matmul_tflops
    attention_flops = 4 * hidden * (num_layers - 1) * workload.prompt_len**2 / 2
    prompt_s = 2 * prompt_weights * workload.prompt_len / product_tflops
    prompt_s += (attention_flops + 2 * head_weights) / ceilings.matmul_tflops
    width = 1 if is_fp8 else 2
    step_bytes = width * num_layers * layer_weights + 2 * head_weights
    context = workload.prompt_len + workload.output_len / 2
    step_bytes += workload.num_streams * context * width * num_layers * 2 * kv_size
    return (
        workload.num_requests * prompt_s / 1e12,
        workload.num_decode_steps * step_bytes / (1e9 * ceilings.read_gb_per_s),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    default = Path("benchmarks/results/gpu-engine.json")
    parser.add_argument("--ceilings", type=Path, default=default, help="results that have them")
    args = parser.parse_args()
    measured = json.loads(args.ceilings.read_text())["ceilings"]
    ceilings = Ceilings(**{name: measured[name] for name in Ceilings.__slots__})
    for name, workload in WORKLOADS.items():
        for kind, is_fp8 in (("bfloat16", False), ("fp8", True)):
            prompts_s, reading_s = needed_s(workload, ceilings, is_fp8=is_fp8)
            limit = limit_tokens_per_s(workload, ceilings, is_fp8=is_fp8)
            print(
                f"{name}, {kind}: {limit:,.0f} tok/s; prompts {prompts_s:.2f} s, "
                f"reading {reading_s:.2f} s"
            )


if __name__ == "__main__":
    main()
