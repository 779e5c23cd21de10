"""How often greedy outputs in bfloat16 differ between ways to serve the same prompts.

    python -m benchmarks.gpu.divergence --output benchmarks/results/gpu-divergence.json

A stack with a prefill and a decode worker on the card, and a colocated worker, are asked the same
prompts: windows of this project's own documents. Exact arithmetic would give the same tokens
everywhere. In bfloat16 a sum's order matters, and kernels choose it by the size of the batch: so
outputs may part where two tokens are almost equally likely. In float32 the parity tests allow no
difference.
"""

import argparse
import asyncio
import json
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx
import torch

from benchmarks.commit import current_commit
from benchmarks.serving.servers import ServerSpec, running, tandem
from engine.tokenizer import Tokenizer
from engine.weights.model_dir import resolve_model

ROOT = Path(__file__).resolve().parents[2]
NUM_ALONE = 16
PROMPT_LENS = range(32, 544, 8)
MAX_TOKENS = 64

Outputs = list[list[int]]


def make_prompts(model: str | None) -> Outputs:
    """Windows of growing length, one behind the other, as token ids."""
    tokenizer = Tokenizer.from_dir(resolve_model(model))
    documents = [ROOT / "README.md", ROOT / "ARCHITECTURE.md", *sorted(ROOT.glob("docs/**/*.md"))]
    text = "\n".join(path.read_text() for path in documents)
    token_ids = tokenizer.encode(text)
    prompts: Outputs = []
    start = 0
    for length in PROMPT_LENS:
        prompts.append(token_ids[start : start + length])
        start += length
    assert len(prompts[-1]) == PROMPT_LENS[-1], "the documents are too short"
    return prompts


async def ask(base_url: str, prompts: Outputs, *, at_once: int) -> Outputs:
    """Greedy outputs, from an empty prefix cache, `at_once` requests under way."""
    gate = asyncio.Semaphore(at_once)
    async with httpx.AsyncClient(base_url=base_url, timeout=300.0) as client:
        (await client.post("/reset_prefix_cache")).raise_for_status()
        model = (await client.get("/v1/models")).json()["data"][0]["id"]

        async def one(prompt: list[int]) -> list[int]:
            body = {
                "model": model,
                "prompt": prompt,
                "temperature": 0,
                "max_tokens": MAX_TOKENS,
                "ignore_eos": True,
                "return_token_ids": True,
            }
            async with gate:
                answer = (await client.post("/v1/completions", json=body)).raise_for_status()
            return answer.json()["choices"][0]["token_ids"]

        return list(await asyncio.gather(*map(one, prompts)))


def difference(ours: Outputs, theirs: Outputs) -> dict[str, Any]:
    """The share of outputs that part, and the share of tokens in front of where they do."""
    equal = [
        next((i for i, (a, b) in enumerate(zip(our, their, strict=True)) if a != b), MAX_TOKENS)
        for our, their in zip(ours, theirs, strict=True)
    ]
    return {
        "outputs": len(equal),
        "diverging": sum(count < MAX_TOKENS for count in equal) / len(equal),
        "tokens_before": sum(equal) / (MAX_TOKENS * len(equal)),
    }


def answers(spec: ServerSpec, prompts: Outputs, log: Path) -> dict[str, Outputs]:
    with running(spec, log) as server:
        return {
            "at once": asyncio.run(ask(server.base_url, prompts, at_once=len(prompts))),
            "at once again": asyncio.run(ask(server.base_url, prompts, at_once=len(prompts))),
            "alone": asyncio.run(ask(server.base_url, prompts[:NUM_ALONE], at_once=1)),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--model", help="default: the built-in model")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--commit", default=current_commit(), help="where the machine has no git")
    args = parser.parse_args()
    prompts = make_prompts(args.model)
    flags = ("--dtype", "bfloat16", *(("--model", args.model) if args.model else ()))
    with TemporaryDirectory() as logs:
        split = answers(tandem("1p1d", *flags), prompts, Path(logs) / "1p1d")
        colocated = tandem("colocated", "--prefill-workers", "0", *flags)
        whole = answers(colocated, prompts, Path(logs) / "colocated")
    some = {name: outputs[:NUM_ALONE] for name, outputs in whole.items()}
    rows = {
        "1P1D and colocated, at once": difference(split["at once"], whole["at once"]),
        "1P1D and colocated, alone": difference(split["alone"], whole["alone"]),
        "colocated, at once and again": difference(whole["at once"], whole["at once again"]),
        "1P1D, at once and again": difference(split["at once"], split["at once again"]),
        "colocated, at once and alone": difference(some["at once"], some["alone"]),
    }
    for name, row in rows.items():
        print(f"{name:32} {row['diverging']:6.1%} part, behind {row['tokens_before']:6.1%}")
    if args.output:
        results = {
            "date": time.strftime("%Y-%m-%d"),
            "commit": args.commit,
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
            "model": args.model or "SmolLM2-135M-Instruct",
            "max_tokens": MAX_TOKENS,
            "rows": rows,
        }
        args.output.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
