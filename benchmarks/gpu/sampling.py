"""Times sampling on a GPU at Llama's vocabulary: the kernels beside the torch operations.

    python -m benchmarks.gpu.sampling [--out FILE]

Calls without a filter run in a CUDA graph. The torch filters ask the device how they went, which
a graph can't, so they are timed from the host, and so are their rivals. Both ways the scores lie
where the model leaves them: in the L2 cache, if that is large enough.
"""

import argparse
import functools
import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from benchmarks.commit import current_commit
from kernels.choice import Filters, choose_tokens, choose_tokens_reference, draw, weigh
from kernels.sampling import (
    filter_weights,
    filter_weights_reference,
    penalize,
    penalize_reference,
    rule_out,
    rule_out_reference,
)

VOCAB_SIZE = 128_256
BATCHES = (1, 16, 64, 256)
# Each is a name, top_k, top_p, min_p, and whether rows are flat.
FILTERS = [
    ("top-k 50", 50, 1.0, 0.0, False),
    ("top-p 0.95", 0, 0.95, 0.0, False),
    ("top-k 50, top-p 0.95", 50, 0.95, 0.0, False),
    ("min-p 0.05", 0, 1.0, 0.05, False),
    ("top-p 0.95, flat", 0, 0.95, 0.0, True),
]

Call = Callable[[], object]


def graph_us(call: Call, calls_a_graph: int = 10, repeats: int = 10) -> float:
    """Microseconds a call in a CUDA graph; the median of some replays."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls_a_graph):
            call()
    graph.replay()
    return median(_event_us(graph.replay) for _ in range(repeats)) / calls_a_graph


def events_us(call: Call, repeats: int = 15) -> float:
    """Microseconds a call from an idle device to the end of its work; the median."""
    call()
    times: list[float] = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        times.append(_event_us(call))
    return median(times)


def host_us(call: Call, repeats: int = 50) -> float:
    """Microseconds that the host needs to issue a call."""
    call()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    spent_s = time.perf_counter() - start
    torch.cuda.synchronize()
    return 1e6 * spent_s / repeats


def _event_us(call: Call) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    return 1e3 * start.elapsed_time(end)


def make_scores(batch: int, *, is_flat: bool) -> Tensor:
    """Like a language model's: many unlikely tokens, a few likely ones; or all much alike."""
    torch.manual_seed(batch)
    scores = torch.randn(batch, VOCAB_SIZE, device="cuda")
    if not is_flat:
        scores *= 2.5
        likely = torch.randint(VOCAB_SIZE, (batch, 20), device="cuda")
        scores.scatter_add_(1, likely, torch.linspace(4, 16, 20, device="cuda").expand(batch, -1))
    return scores.bfloat16().float()


def columns_of(batch: int, top_k: int, top_p: float, min_p: float) -> dict[str, Tensor]:
    return {
        "top_k": torch.full((batch,), top_k, device="cuda"),
        "top_p": torch.full((batch,), top_p, device="cuda"),
        "min_p": torch.full((batch,), min_p, device="cuda"),
    }


def bench_choice(batch: int) -> list[dict[str, Any]]:
    scores = make_scores(batch, is_flat=False)
    work = scores.clone()
    draws = {
        "temperature": torch.full((batch,), 0.8, device="cuda"),
        "uniforms": torch.rand(batch, dtype=torch.float64, device="cuda"),
    }
    logits = scores.bfloat16()
    copy_us = graph_us(lambda: work.copy_(scores))
    # The reference asks which rows are random; the operations that this leads to don't.
    rows = [
        {
            "what": "largest of bfloat16",
            "torch_us": graph_us(lambda: logits.argmax(-1)),
            "kernel_us": graph_us(lambda: choose_tokens(logits)),
            "host_us": host_us(lambda: choose_tokens(logits)),
        },
        {
            "what": "random",
            "torch_us": graph_us(lambda: _draw_in_torch(work.copy_(scores), **draws)) - copy_us,
            "kernel_us": graph_us(lambda: choose_tokens(scores, **draws)),
            "host_us": host_us(lambda: choose_tokens(scores, **draws)),
        },
    ]
    for name, top_k, top_p, min_p, is_flat in FILTERS:
        scores = make_scores(batch, is_flat=is_flat)
        columns = columns_of(batch, top_k, top_p, min_p)
        options = {**draws, "filters": Filters(**columns)}
        expected = choose_tokens_reference(scores.clone(), **options)
        agreeing = (choose_tokens(scores, **options) == expected).float().mean().item()
        filtered = functools.partial(choose_tokens, scores, **options)
        rows.append(
            {
                "what": name,
                "torch_us": events_us(_filter_in_torch(scores, work, draws, columns)) - copy_us,
                "kernel_us": graph_us(filtered),
                "kernel_from_host_us": events_us(filtered),
                "host_us": host_us(filtered),
                "agreeing": agreeing,
            }
        )
    return [{"batch": batch, **row} for row in rows]


def _draw_in_torch(scores: Tensor, temperature: Tensor, uniforms: Tensor) -> Tensor:
    return draw(weigh(scores, temperature), uniforms)


def _filter_in_torch(
    scores: Tensor, work: Tensor, draws: dict[str, Tensor], columns: dict[str, Tensor]
) -> Call:
    largest = int(columns["top_k"].max())
    options = {
        **columns,
        "min_p": columns["min_p"] if columns["min_p"].any() else None,
        "max_top_k": largest or None,
    }

    def call() -> Tensor:
        weights = weigh(work.copy_(scores), draws["temperature"])
        return draw(filter_weights_reference(weights, **options), draws["uniforms"])

    return call


def bench_changes(batch: int) -> list[dict[str, Any]]:
    scores = make_scores(batch, is_flat=False)
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    work = torch.empty_like(weights)
    copy_us = graph_us(lambda: work.copy_(weights))
    columns = columns_of(batch, 50, 0.95, 0.0)
    kept = filter_weights(weights.clone(), **columns)
    assert torch.equal(kept, filter_weights_reference(weights.clone(), **columns))
    places = torch.arange(batch, device="cuda")
    penalties = {
        "places": places,
        "slots": places,
        "output_counts": torch.randint(0, 2, scores.shape, dtype=torch.int32, device="cuda"),
        "in_prompt": torch.rand(scores.shape, device="cuda") < 0.01,
        **{
            name: torch.full((batch,), value, device="cuda")
            for name, value in (("repetition", 1.1), ("presence", 0.1), ("frequency", 0.1))
        },
    }
    words = torch.randint(
        -(2**31), 2**31, (batch, VOCAB_SIZE // 32), dtype=torch.int32, device="cuda"
    )
    masks = {"places": places, "allowed": words}
    in_torch = functools.partial(
        filter_weights_reference, **{**columns, "min_p": None, "max_top_k": 50}
    )
    return [
        {
            "batch": batch,
            "what": "filter weights, top-k 50, top-p 0.95",
            "torch_us": events_us(lambda: in_torch(work.copy_(weights))) - copy_us,
            "kernel_us": graph_us(lambda: filter_weights(work.copy_(weights), **columns)) - copy_us,
        },
        {
            "batch": batch,
            "what": "penalties",
            "torch_us": graph_us(lambda: penalize_reference(scores, **penalties)),
            "kernel_us": graph_us(lambda: penalize(scores, **penalties)),
        },
        {
            "batch": batch,
            "what": "masks",
            "torch_us": graph_us(lambda: rule_out_reference(scores, **masks)),
            "kernel_us": graph_us(lambda: rule_out(scores, **masks)),
        },
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--commit", default=current_commit(), help="where the machine has no git")
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for batch in BATCHES:
        for row in bench_choice(batch) + bench_changes(batch):
            print({k: round(v, 2) if isinstance(v, float) else v for k, v in row.items()})
            rows.append(row)
    results = {
        "date": time.strftime("%Y-%m-%d"),
        "commit": args.commit,
        "card": torch.cuda.get_device_name(),
        "vocab_size": VOCAB_SIZE,
        "rows": rows,
    }
    if args.out:
        args.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
