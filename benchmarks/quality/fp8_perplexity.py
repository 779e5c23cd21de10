"""Perplexity of a model with and without fp8, on a text that comes with Python.

    python -m benchmarks.quality.fp8_perplexity [--model DIR] [--tokens 8192] [--out FILE]
        [--quantization-ignore LAYER ...]

The text is Python's language reference as the standard library carries it for `help()`
(`pydoc_data.topics`; PSF License, https://docs.python.org/3/license.html), cut into windows that
are read on their own. On a CPU "fp8 products" are those of the references in `kernels`, on a GPU
its own; "fp8 weights" are dequantized once, which is what a CPU serves.
"""

import argparse
import json
import math
import platform
import time
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from torch import Tensor

from benchmarks.commit import current_commit
from engine.models.causal_lm import CausalLM
from engine.models.config import read_model_config
from engine.models.registry import load_model
from engine.tokenizer import Tokenizer
from engine.weights.model_dir import resolve_model
from kernels.attention import AttentionBatch
from kernels.fp8 import FP8

WINDOW = 512
BLOCK_SIZE = 16
# Name, `--quantization`, whether products are of 8 bits, and whether keys and values are.
VARIANTS = (
    ("unquantized", None, False, False),
    ("fp8 weights", "fp8", False, False),
    ("fp8 products", "fp8", True, False),
    ("fp8 KV", None, False, True),
    ("fp8 products and KV", "fp8", True, True),
)


def read_windows(tokenizer: Tokenizer, num_tokens: int) -> Iterator[list[int]]:
    """`num_tokens` tokens of the longest topics, the text of each up to its last whole window."""
    left = num_tokens
    for text in sorted(topics.values(), key=len, reverse=True):
        ids = tokenizer.encode(text)
        for start in range(0, len(ids) - WINDOW + 1, WINDOW):
            if left <= 0:
                return
            left -= WINDOW
            yield ids[start : start + WINDOW]


def window_loss(model: CausalLM, ids: list[int], kv_dtype: torch.dtype) -> float:
    """Mean negative log-probability of a window's tokens behind its first."""
    device, count = model.device, len(ids)
    config = model.config
    num_blocks = -(-count // BLOCK_SIZE)
    shape = (num_blocks, config.num_layers, 2, config.num_kv_heads, BLOCK_SIZE, config.head_dim)
    positions = torch.arange(count, device=device)
    batch = AttentionBatch(
        query_starts=torch.tensor([0, count], dtype=torch.int32, device=device),
        kv_lens=torch.tensor([count], dtype=torch.int32, device=device),
        block_tables=torch.arange(num_blocks, dtype=torch.int32, device=device)[None],
        slots=positions,
        positions=positions,
        max_query_len=count,
        max_kv_len=count,
        num_seqs=1,
    )
    tokens: Tensor = torch.tensor(ids, device=device)
    pool = torch.zeros(shape, dtype=kv_dtype, device=device)
    logits = model.logits(model.forward(tokens, batch, pool)[:-1]).float()
    return torch.nn.functional.cross_entropy(logits, tokens[1:]).item()


@torch.inference_mode()
def perplexity(
    model: CausalLM, windows: list[list[int]], kv_dtype: torch.dtype | None = None
) -> float:
    """`kv_dtype` is the model's own by default."""
    dtype = kv_dtype or model.dtype
    return math.exp(sum(window_loss(model, window, dtype) for window in windows) / len(windows))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--model", help="default: the built-in one")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--quantization-ignore", nargs="*", default=[], metavar="LAYER")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--commit", default=current_commit(), help="where the machine has no git")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model_dir = resolve_model(args.model)
    config = read_model_config(model_dir)
    windows = list(read_windows(Tokenizer.from_dir(model_dir), args.tokens))
    results: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"),
        "commit": args.commit,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else platform.machine(),
        "python": platform.python_version(),
        "model": model_dir.name,
        "tokens": len(windows) * (WINDOW - 1),
        "quantization_ignore": args.quantization_ignore,
        "perplexity": {},
    }
    base = 0.0
    for name, quantization, fp8_products, fp8_kv in VARIANTS:
        model = load_model(
            config.quantized(quantization, args.quantization_ignore if quantization else ()),
            model_dir,
            dtype=torch.bfloat16,
            device=device,
            fp8_products=fp8_products,
        )
        value = perplexity(model, windows, FP8 if fp8_kv else None)
        results["perplexity"][name] = value
        base = base or value
        print(f"{name}: {value:.4f} ({100 * (value / base - 1):+.2f} %)", flush=True)
    if args.out:
        args.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
