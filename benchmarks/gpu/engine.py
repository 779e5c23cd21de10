"""Times engine steps of a model with random weights on a GPU, beside the card's own ceilings.

    python -m benchmarks.gpu.engine [--quantization fp8] [--kv-cache-dtype fp8] [--layers 32]
        [--only decode] [--one-by-one] [--skip-prompts] [--max-num-batched-tokens 16384]
        [--attention-backend flash-attn] [--out benchmarks/results/gpu-engine.json]

The model has Llama-3.1-8B's shape, or fewer of its layers. Each row says how long a step took and
which share of that the limit that binds it would need: the matrix units for prefill, reading
weights and KV for decode. Ceilings are measured first, in the same run, and tokens checked:
those of decode steps are to be the ones that a prompt of the same context yields. A profile says
what time goes to, and for which share of decode's no kernel ran; `--one-by-one` launches no step
before the one before is known. `--skip-prompts` decodes over blocks of random numbers instead of
computed prompts.
"""

import argparse
import dataclasses
import json
import random
import time
from pathlib import Path
from statistics import mean, median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from benchmarks.commit import current_commit
from benchmarks.gpu.device_time import device_spans, idle_share, kernel_ms
from benchmarks.gpu.llama_8b import LLAMA_8B
from engine.config import EngineConfig
from engine.engine import Engine
from engine.models.causal_lm import CausalLM
from engine.models.config import ModelConfig, read_model_config
from engine.models.registry import load_model
from engine.sequence import Sequence
from engine.step_loop import StepLoop
from kernels.attention import AttentionBatch, LastTokens
from kernels.fp8 import quantize_rows
from kernels.gpu.fp8_linear import library_linear
from protocol.ids import RequestKey
from protocol.request import Request
from protocol.sampling import SamplingParams

PREFILL = ((64, 2048), (8, 8192), (1, 32768))
# With what is generated until and while steps are timed, contexts of 1,168 tokens, as in the table
# that docs/performance.md compares with.
DECODE = ((1, 1136), (16, 1136), (64, 1134), (256, 1126), (8, 32640), (16, 32640))
# Sequences, prompt tokens and outputs of the check.
CHECKED = (16, 300, 16)
# A wrong kernel leaves none of 240. Rounding to 16 bits left 89 %; to 8 bits, which is 8 times as
# coarse, 33 %, and of prompts' queries, too, in FlashAttention, 25 %.
LEAST_AGREEMENT, LEAST_FP8_AGREEMENT = 0.6, 0.1
NUM_DECODE_STEPS = 64
NUM_PROFILED_STEPS = 16
BATCHED_TOKENS = 16384


@dataclasses.dataclass(frozen=True)
class Ceilings:
    """What the card does at best: TFLOP/s of a large bf16 and fp8 product, GB/s read, and GB/s read
    and written by a copy."""

    matmul_tflops: float
    fp8_tflops: float
    read_gb_per_s: float
    copy_gb_per_s: float


def measure_ceilings() -> Ceilings:
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    matmul_s = time_call(lambda: a @ a)
    memory = torch.zeros(1 << 30, device="cuda", dtype=torch.float32)
    read_s = time_call(lambda: memory.sum())
    source, target = memory.chunk(2)
    copy_s = time_call(lambda: target.copy_(source))
    rows = quantize_rows(a)
    fp8_s = time_call(lambda: library_linear(rows, rows, None, dtype=a.dtype))
    flops = 2 * 8192**3
    return Ceilings(
        flops / matmul_s / 1e12,
        flops / fp8_s / 1e12,
        memory.nbytes / read_s / 1e9,
        memory.nbytes / copy_s / 1e9,
    )


def time_call(call: Any, repeats: int = 20) -> float:  # noqa: ANN401
    """Seconds of the fastest of some calls, by the device's clock."""
    call()
    times: list[float] = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return min(times)


def add_requests(
    loop: StepLoop, num_seqs: int, prompt_len: int, num_outputs: int
) -> list[Sequence]:
    rng = random.Random(num_seqs)
    sequences: list[Sequence] = []
    for i in range(num_seqs):
        token_ids = [rng.randrange(1000, 100_000) for _ in range(prompt_len)]
        sequences.append(make_sequence(loop, i, token_ids, num_outputs))
        loop.add(sequences[-1])
    return sequences


def make_sequence(loop: StepLoop, number: int, token_ids: list[int], num_outputs: int) -> Sequence:
    request = Request(
        key=RequestKey(str(number), 0),
        token_ids=token_ids,
        num_prompt_tokens=len(token_ids),
        sampling=SamplingParams(temperature=0.0, max_tokens=num_outputs, ignore_eos=True),
    )
    root = loop.engine.root_hash(None)
    return Sequence(request=request, root=root, arrival_s=float(number))


def run_step(loop: StepLoop) -> tuple[int, float]:
    """Sequences that sampled, and seconds."""
    started = time.perf_counter()
    num_sampled = sum(1 for _ in loop.step())
    return num_sampled, time.perf_counter() - started


def fill_with_noise(kv_pool: Tensor) -> None:
    for piece in kv_pool.split(1024):
        piece.copy_(torch.randn(piece.shape, dtype=torch.bfloat16, device=piece.device))


def llama_config(
    model_dir: Path,
    num_layers: int,
    quantization: str | None,
    quantization_ignore: tuple[str, ...] = (),
) -> ModelConfig:
    """As read back from the checkpoint's configuration that this writes."""
    (model_dir / "config.json").write_text(json.dumps(LLAMA_8B | {"num_hidden_layers": num_layers}))
    return read_model_config(model_dir).quantized(quantization, quantization_ignore)


def make_engine(
    model_dir: Path,
    num_layers: int,
    *,
    quantization: str | None,
    quantization_ignore: tuple[str, ...] = (),
    kv_cache_dtype: str,
    max_num_batched_tokens: int = BATCHED_TOKENS,
    enable_prefix_caching: bool = False,
    **options: Any,  # noqa: ANN401
) -> tuple[Engine, CausalLM]:
    """Llama-3.1-8B's shape with random weights; `options` are `EngineConfig`'s."""
    model_config = llama_config(model_dir, num_layers, quantization, quantization_ignore)
    config = EngineConfig(
        model=str(model_dir),
        max_num_batched_tokens=max_num_batched_tokens,
        enable_prefix_caching=enable_prefix_caching,
        kv_cache_dtype=kv_cache_dtype,
        **options,
    )
    model = load_model(
        model_config,
        model_dir,
        dtype=torch.bfloat16,
        device=torch.device("cuda"),
        load_format="dummy",
    )
    return Engine(config, "dummy", model, progress=True), model


class Bench:
    """One engine, and what its model's steps need at least."""

    def __init__(
        self,
        model_dir: Path,
        num_layers: int,
        ceilings: Ceilings,
        *,
        quantization: str | None,
        quantization_ignore: tuple[str, ...],
        one_by_one: bool,
        kv_cache_dtype: str,
        attention_backend: str,
        max_num_batched_tokens: int,
        skip_prompts: bool,
    ) -> None:
        shape = LLAMA_8B | {"num_hidden_layers": num_layers}
        started = time.perf_counter()
        self.engine, model = make_engine(
            model_dir,
            num_layers,
            quantization=quantization,
            quantization_ignore=quantization_ignore,
            kv_cache_dtype=kv_cache_dtype,
            attention_backend=attention_backend,
            max_num_batched_tokens=max_num_batched_tokens,
            async_scheduling=not one_by_one,
        )
        self.start_s = time.perf_counter() - started
        if skip_prompts:
            fill_with_noise(self.engine.kv_pool)
            forward = model.forward

            def decode_only(
                token_ids: Tensor,
                batch: AttentionBatch,
                kv_pool: Tensor,
                last: LastTokens | None = None,
            ) -> Tensor:
                if last is None:
                    return forward(token_ids, batch, kv_pool)
                shape = (batch.num_seqs, model.config.hidden_size)
                return torch.zeros(shape, dtype=model.dtype, device=model.device)

            model.forward = decode_only
        self._ceilings = ceilings
        hidden, mlp = shape["hidden_size"], shape["intermediate_size"]
        kv_size = shape["num_key_value_heads"] * shape["head_dim"]
        self._layer_weights = num_layers * hidden * (2 * hidden + 2 * kv_size + 3 * mlp)
        # Of the last layer, a prompt's tokens but the last need no more than keys and values.
        needed = (num_layers - 1) / num_layers
        self._prompt_weights = needed * self._layer_weights + 2 * kv_size * hidden
        self._head_weights = shape["vocab_size"] * hidden
        self._weight_bytes = 2 if quantization is None else 1
        self._tflops = ceilings.matmul_tflops if quantization is None else ceilings.fp8_tflops
        self._attention_flops = 4 * hidden * (num_layers - 1)

    def agreement(self) -> float:
        """For which share of contexts decode steps and prompts, which have kernels of their own,
        choose the same token. Where two are almost equally likely, they may not."""
        loop = StepLoop(self.engine)
        decoded = add_requests(loop, *CHECKED)
        while loop.has_work:
            run_step(loop)
        num_prompt_tokens = CHECKED[1]
        chosen: list[Sequence] = []
        first_decoded = num_prompt_tokens + 1
        for sequence in decoded:
            for end in range(first_decoded, sequence.num_tokens):
                chosen.append(make_sequence(loop, len(chosen), sequence.token_ids[:end], 1))
                loop.add(chosen[-1])
        while loop.has_work:
            run_step(loop)
        expected = (token for each in decoded for token in each.token_ids[first_decoded:])
        pairs = zip(expected, chosen, strict=True)
        return mean(token == sequence.token_ids[-1] for token, sequence in pairs)

    def prefill(self, num_seqs: int, prompt_len: int) -> dict[str, Any]:
        """Prompts of one length until each has its first token; once more for the profile."""
        total_s = self._compute(num_seqs, prompt_len)
        attention_flops = self._attention_flops * prompt_len**2 / 2 + 2 * self._head_weights
        layers_s = 2 * self._prompt_weights * prompt_len / self._tflops
        floor_s = num_seqs * (layers_s + attention_flops / self._ceilings.matmul_tflops) / 1e12
        return {
            "num_seqs": num_seqs,
            "prompt_len": prompt_len,
            "tokens_per_s": num_seqs * prompt_len / total_s,
            "share_of_limit": floor_s / total_s,
            "kernel_ms": kernel_ms(device_spans(lambda: self._compute(num_seqs, prompt_len))),
        }

    def _compute(self, num_seqs: int, prompt_len: int) -> float:
        loop = StepLoop(self.engine)
        add_requests(loop, num_seqs, prompt_len, 1)
        total_s = 0.0
        while loop.has_work:
            total_s += run_step(loop)[1]
        return total_s

    def fits(self, num_seqs: int, prompt_len: int) -> bool:
        """Whether the pool has room for a row of `DECODE`."""
        num_tokens = prompt_len + NUM_DECODE_STEPS + NUM_PROFILED_STEPS + num_seqs
        layout = self.engine.model.layout
        needed = num_seqs * -(-num_tokens // layout.block_size)
        return needed <= self.engine.kv_pool.shape[0]

    def decode(self, num_seqs: int, prompt_len: int) -> dict[str, Any]:
        """The median step with all sequences running."""
        loop = StepLoop(self.engine)
        num_outputs = NUM_DECODE_STEPS + NUM_PROFILED_STEPS + num_seqs
        sequences = add_requests(loop, num_seqs, prompt_len, num_outputs)
        times: list[float] = []
        contexts: list[float] = []
        while len(times) < NUM_DECODE_STEPS:
            num_sampled, seconds = run_step(loop)
            if num_sampled == num_seqs:
                times.append(seconds)
                contexts.append(mean(sequence.num_tokens for sequence in sequences))
        spans = device_spans(lambda: [run_step(loop) for _ in range(NUM_PROFILED_STEPS)])
        while loop.has_work:
            run_step(loop)
        # The first ones of the full batch are prefill's last.
        decode_s = median(times[2:])
        context = mean(contexts[2:])
        kv_bytes = self.engine.model.layout.token_bytes * context * num_seqs
        num_bytes = self._weight_bytes * self._layer_weights + 2 * self._head_weights + kv_bytes
        floor_s = num_bytes / (1e9 * self._ceilings.read_gb_per_s)
        return {
            "num_seqs": num_seqs,
            "context": context,
            "step_ms": 1e3 * decode_s,
            "idle_share": idle_share(spans),
            "share_of_limit": floor_s / decode_s,
            "kernel_ms": {
                kind: round(spent_ms / NUM_PROFILED_STEPS, 3)
                for kind, spent_ms in kernel_ms(spans).items()
            },
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--quantization", choices=("fp8",))
    parser.add_argument("--quantization-ignore", nargs="*", default=[], metavar="LAYER")
    parser.add_argument("--only", choices=("prefill", "decode"))
    parser.add_argument("--one-by-one", action="store_true", help="no step ahead of the others")
    parser.add_argument("--kv-cache-dtype", default="auto")
    parser.add_argument("--attention-backend", choices=("auto", "flash-attn"), default="auto")
    parser.add_argument("--max-num-batched-tokens", type=int, default=BATCHED_TOKENS)
    parser.add_argument("--skip-prompts", action="store_true", help="only for decode")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--commit", default=current_commit(), help="where the machine has no git")
    args = parser.parse_args()
    ceilings = measure_ceilings()
    print(ceilings)
    with TemporaryDirectory() as model_dir:
        bench = Bench(
            Path(model_dir),
            args.layers,
            ceilings,
            quantization=args.quantization,
            quantization_ignore=tuple(args.quantization_ignore),
            one_by_one=args.one_by_one,
            kv_cache_dtype=args.kv_cache_dtype,
            attention_backend=args.attention_backend,
            max_num_batched_tokens=args.max_num_batched_tokens,
            skip_prompts=args.skip_prompts,
        )
    print(f"start {bench.start_s:.1f} s")
    results: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"),
        "commit": args.commit,
        "card": torch.cuda.get_device_name(),
        "layers": args.layers,
        "quantization": args.quantization,
        "quantization_ignore": args.quantization_ignore,
        "one_by_one": args.one_by_one,
        "kv_cache_dtype": args.kv_cache_dtype,
        "attention_backend": args.attention_backend,
        "max_num_batched_tokens": args.max_num_batched_tokens,
        "skip_prompts": args.skip_prompts,
        "ceilings": dataclasses.asdict(ceilings),
        "start_s": bench.start_s,
        "prefill": [],
        "decode": [],
    }
    if not args.skip_prompts:
        results["agreement"] = bench.agreement()
        print(f"decode steps and prompts agree on {results['agreement']:.0%} of tokens")
        is_fp8 = args.quantization is not None or args.kv_cache_dtype.startswith("fp8")
        least = LEAST_FP8_AGREEMENT if is_fp8 else LEAST_AGREEMENT
        if results["agreement"] < least:
            raise SystemExit(f"less than {least:.0%}: a kernel is wrong")
        bench.prefill(8, 2048)
    for num_seqs, prompt_len in PREFILL if args.only != "decode" else ():
        results["prefill"].append(bench.prefill(num_seqs, prompt_len))
        print(results["prefill"][-1], flush=True)
    for num_seqs, prompt_len in DECODE if args.only != "prefill" else ():
        if not bench.fits(num_seqs, prompt_len):
            continue
        results["decode"].append(bench.decode(num_seqs, prompt_len))
        print(results["decode"][-1], flush=True)
    if args.out:
        args.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
