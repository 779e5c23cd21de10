"""How much the built-in model loses by keeping its keys and values in 8 bits.

    python -m benchmarks.quality.kv_cache [--out benchmarks/results/kv-cache-quality.json]

For each `--kv-cache-dtype`: perplexity of the text that `fp8_perplexity` reads, and the share of
greedy tokens that are those of 16 bits, up to the first one that differs.
"""

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.commit import current_commit
from benchmarks.quality.fp8_perplexity import read_windows
from engine import LLM, SamplingParams

KV_DTYPES = ("auto", "fp8_e4m3", "fp8_e5m2")
PROMPT_TOKENS = 256
NUM_OUTPUTS = 64


def perplexity(llm: LLM, texts: list[list[int]]) -> float:
    sampling = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0)
    logprobs: list[float] = []
    for output in llm.generate([{"prompt_token_ids": ids} for ids in texts], sampling):
        for token_id, named in zip(
            output.prompt_token_ids, output.prompt_logprobs or [], strict=True
        ):
            if named is not None:
                logprobs.append(named[token_id].logprob)
    return math.exp(-sum(logprobs) / len(logprobs))


def greedy(llm: LLM, texts: list[list[int]]) -> list[list[int]]:
    sampling = SamplingParams(temperature=0.0, max_tokens=NUM_OUTPUTS, ignore_eos=True)
    prompts: Any = [{"prompt_token_ids": ids[:PROMPT_TOKENS]} for ids in texts]
    return [output.outputs[0].token_ids for output in llm.generate(prompts, sampling)]


def share_equal(ours: list[list[int]], theirs: list[list[int]]) -> float:
    """Of the tokens in front of the first difference, each text by itself."""
    num_equal = 0
    for a, b in zip(ours, theirs, strict=True):
        num_equal += next((i for i in range(len(a)) if a[i] != b[i]), len(a))
    return num_equal / sum(map(len, theirs))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    expected: list[list[int]] = []
    for kv_dtype in KV_DTYPES:
        llm = LLM(dtype=args.dtype, kv_cache_dtype=kv_dtype, num_gpu_blocks_override=2048)
        texts = list(read_windows(llm.tokenizer, args.tokens))
        tokens = greedy(llm, texts)
        expected = expected or tokens
        row = {
            "kv_cache_dtype": kv_dtype,
            "perplexity": perplexity(llm, texts),
            "greedy_share_equal": share_equal(tokens, expected),
            "kv_bytes_per_token": llm.engine.model.layout.token_bytes,
        }
        print(row, flush=True)
        rows.append(row)
    results = {
        "date": time.strftime("%Y-%m-%d"),
        "commit": current_commit(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "dtype": args.dtype,
        "num_tokens": args.tokens,
        "rows": rows,
    }
    if args.out:
        args.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
