"""`tandem serve` on a card, or two: a model of Llama-3.1-8B's shape, random weights, over HTTP.

    CUDA_VISIBLE_DEVICES=0 python -m benchmarks.gpu.serve --output benchmarks/results/gpu-serve.json

Router, Redis and workers are real ones, and the client is the project's own. Each stack, one
colocated worker or a prefill and a decode worker that share the card (or, where two may be used,
have one each), is started anew and timed to its first token, then runs two loads:

- "steady": 1,024-token prompts, 256 tokens out, 64 streams at once.
- "interference": 32 running streams, and then 8,192-token prompts, four a second. Counted are the
  streams' gaps between tokens while those come; a stream that ended before them stops the run.

An answer of another length than was asked for stops it, too.

"offline" is `engine.LLM` in a process of its own: a long shared prefix, and long prompts, of which
`--offline-repeats` tells whether the first run is like others.
"""

import argparse
import asyncio
import itertools
import json
import random
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import httpx
import msgspec
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from benchmarks.gpu.llama_8b import LLAMA_8B
from benchmarks.serving.servers import RunningServer, running, tandem
from loadtest.client import LoadClient
from loadtest.config import BenchConfig
from loadtest.http_connection import HttpClient
from loadtest.prompt_text import PromptWriter
from loadtest.results import RequestResult, distribution, percentile, summarize
from loadtest.runner import run_load
from loadtest.workload import PlannedRequest

VOCAB_SIZE: int = LLAMA_8B["vocab_size"]
NUM_WORDS: int = LLAMA_8B["bos_token_id"]
MAX_MODEL_LEN = 16384
MODEL = "llama-8b-shape"
STEADY = (1024, 256, 64)
NUM_STEADY = 256
NUM_STREAMS = 32
STREAM_TOKENS = 4000
"""Enough for the time of all long prompts at 3 ms a token."""
INTRUDER_TOKENS = 8192
INTRUDERS_PER_S = 4.0
INTERFERENCE_S = 8.0
SETTLE_S = 3.0
"""From the streams' start to the first long prompt; all of them decode by then."""
COMMON = ("--load-format", "dummy", "--served-model-name", MODEL, "--no-enable-prefix-caching")
STACKS: dict[str, tuple[str, ...]] = {
    "colocated": ("--prefill-workers", "0"),
    "1P1D": ("--local-prefill", "never"),
}


def write_model(directory: Path, num_layers: int) -> None:
    """A config, and a tokenizer in which every id of the vocabulary is a word."""
    sizes = {"num_hidden_layers": num_layers, "max_position_embeddings": MAX_MODEL_LEN}
    (directory / "config.json").write_text(json.dumps(LLAMA_8B | sizes))
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = itertools.islice(map("".join, itertools.product(letters, repeat=4)), NUM_WORDS)
    special = [f"<|special_{number}|>" for number in range(VOCAB_SIZE - NUM_WORDS)]
    vocabulary = {f"Ġ{word}": at for at, word in enumerate(words)}
    vocabulary |= {token: NUM_WORDS + at for at, token in enumerate(special)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=special[2]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    tokenizer.save(str(directory / "tokenizer.json"))


class Load:
    """The client of one running stack."""

    def __init__(self, server: RunningServer, http: HttpClient, model_dir: Path) -> None:
        self._server = server
        config = BenchConfig(endpoint="completions", request_timeout_s=180.0)
        self._client = LoadClient(http, config, MODEL)
        self._writer = PromptWriter.for_tokenizer(model_dir)

    async def steady(self) -> dict[str, Any]:
        prompt_len, output_len, concurrency = STEADY
        await self._run(self._requests("warm-up", 4, prompt_len, 16), concurrency)
        requests = self._requests("steady", NUM_STEADY, prompt_len, output_len)
        results, duration_s = await self._run(requests, concurrency)
        return msgspec.to_builtins(summarize(results, duration_s))

    async def interference(self) -> dict[str, Any]:
        """Gaps of running streams while long prompts come."""
        streams = self._requests("streams", NUM_STREAMS, 256, STREAM_TOKENS)
        count = int(INTERFERENCE_S * INTRUDERS_PER_S)
        intruders = [
            PlannedRequest(request.prompt, request.output_len, SETTLE_S + at / INTRUDERS_PER_S)
            for at, request in enumerate(self._requests("long", count, INTRUDER_TOKENS, 16))
        ]
        (running_streams, _), (long_prompts, _) = await asyncio.gather(
            self._run(streams, NUM_STREAMS), self._run(intruders, None)
        )
        end_s = SETTLE_S + INTERFERENCE_S
        first_end_s = min(result.start_s + result.end_to_end_s for result in running_streams)
        if first_end_s < end_s:
            raise SystemExit(f"a stream ended after {first_end_s:.1f} s, not after {end_s:.1f}")
        return {
            "before": _gaps_ms(running_streams, 1.0, SETTLE_S),
            "meanwhile": _gaps_ms(running_streams, SETTLE_S, end_s),
            "num_long_prompts": len(long_prompts),
            "long_prompts_ttft": msgspec.to_builtins(
                distribution(result.first_token_s for result in long_prompts)
            ),
        }

    async def single_long_prompt(self) -> dict[str, float]:
        """One 8,192-token prompt at a time: its TTFT, as the client sees it, in ms."""
        requests = self._requests("alone", 6, INTRUDER_TOKENS, 4)
        results, _ = await self._run(requests, 1)
        times = [1000 * result.first_token_s for result in results if result.first_token_s]
        return {"ttft_ms": median(times[1:])}

    async def _run(
        self, requests: Sequence[PlannedRequest], concurrency: int | None
    ) -> tuple[list[RequestResult], float]:
        results, duration_s = await run_load(
            self._client, requests, max_concurrency=concurrency, on_result=lambda _: None
        )
        errors = [result.error for result in results if result.error is not None]
        if errors:
            raise SystemExit(f"{len(errors)} of {len(results)} requests failed: {errors[0]}")
        for request, result in zip(requests, results, strict=True):
            if result.output_tokens != request.output_len:
                raise SystemExit(f"{result.output_tokens} tokens instead of {request.output_len}")
        return results, duration_s

    def _requests(
        self, name: str, count: int, prompt_len: int, output_len: int
    ) -> list[PlannedRequest]:
        return [
            PlannedRequest(self._writer.write(prompt_len, random.Random(f"{name} {n}")), output_len)
            for n in range(count)
        ]


def _gaps_ms(results: Sequence[RequestResult], start_s: float, end_s: float) -> dict[str, float]:
    """Gaps between tokens that ended within this time of the run."""
    gaps: list[float] = []
    for result in results:
        now_s = result.start_s + (result.first_token_s or 0.0)
        for gap_s in result.gaps_s:
            now_s += gap_s
            if start_s <= now_s < end_s:
                gaps.append(1000 * gap_s)
    gaps.sort()
    if not gaps:
        return {"count": 0}
    shares = {f"p{percent}": percentile(gaps, percent) for percent in (50, 90, 99)}
    return {"count": len(gaps), **shares, "maximum": gaps[-1]}


def exposed_transfer(server: RunningServer) -> dict[str, float]:
    """Mean seconds that requests waited for the last of their KV, from the prefill worker."""
    command = [sys.executable, "-m", "cli", "ps", "--json"]
    stacks = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    (stack,) = [stack for stack in stacks if stack["supervisor_pid"] == server.pid]
    samples: dict[str, float] = {}
    for process in stack["processes"]:
        if process["role"] != "prefill":
            continue
        text = httpx.get(f"{process['addresses']['metrics']}/metrics", timeout=10.0).text
        for line in text.splitlines():
            if line.startswith(("tandem:kv_transfer", "tandem:kv_exposed", "tandem:exposed")):
                name, _, value = line.rpartition(" ")
                if "_bucket" not in name and "_created" not in name:
                    samples[name.split("{")[0]] = float(value)
    return samples


def measure_stack(name: str, model_dir: Path, flags: Sequence[str], log: Path) -> dict[str, Any]:
    spec = tandem(name, "--model", str(model_dir), *COMMON, *STACKS[name], *flags)

    async def run(server: RunningServer) -> dict[str, Any]:
        async with HttpClient(server.base_url, api_key=None) as http:
            load = Load(server, http, model_dir)
            result: dict[str, Any] = {"steady": await load.steady()}
            before = exposed_transfer(server)
            result["single_long_prompt"] = await load.single_long_prompt()
            result["prefill_metrics"] = {"before": before, "after": exposed_transfer(server)}
            result["interference"] = await load.interference()
            return result

    with running(spec, log) as server:
        return {"start_to_first_token_s": server.first_token_s} | asyncio.run(run(server))


def measure_offline(model_dir: Path, flags: Sequence[str], num_repeats: int) -> dict[str, Any]:
    """Output tokens a second of one engine; called in a process of its own. `flags` are pairs of a
    name and a value."""
    # Only here, since the parent must leave the card alone.
    from engine import LLM, SamplingParams

    started_s = time.perf_counter()
    names = [flag.removeprefix("--").replace("-", "_") for flag in flags[::2]]
    options = dict(zip(names, flags[1::2], strict=True))
    llm = LLM(str(model_dir), load_format="dummy", max_num_batched_tokens=8192, **options)
    result: dict[str, Any] = {"start_s": time.perf_counter() - started_s}
    result["num_blocks"] = llm.engine.kv_pool.shape[0]
    rng = random.Random(0)

    def tokens(count: int) -> list[int]:
        return [rng.randrange(NUM_WORDS) for _ in range(count)]

    def rate(prompts: list[list[int]], output_len: int) -> float:
        sampling = SamplingParams(temperature=0.0, max_tokens=output_len, ignore_eos=True)
        started_s = time.perf_counter()
        llm.generate([{"prompt_token_ids": p} for p in prompts], sampling, use_tqdm=False)
        return len(prompts) * output_len / (time.perf_counter() - started_s)

    rate([tokens(64) for _ in range(8)], 8)
    prefix = tokens(4096)
    rate([prefix + tokens(128)], 1)
    result["shared_prefix_64x4096+128_out128"] = rate(
        [prefix + tokens(128) for _ in range(64)], 128
    )
    rates = [rate([tokens(4096) for _ in range(128)], 256) for _ in range(num_repeats)]
    result["long_prompts_128x4096_out256"] = median(rates)
    result["long_prompts_each"] = rates
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--stacks", nargs="*", default=list(STACKS), choices=list(STACKS))
    parser.add_argument("--offline", action="store_true", help="also engine.LLM")
    parser.add_argument("--offline-repeats", type=int, default=1, help="of the long prompts")
    parser.add_argument("--layers", type=int, default=LLAMA_8B["num_hidden_layers"])
    parser.add_argument("--flags", default="", help="more of tandem serve's, in one word")
    parser.add_argument("--commit", help="what was measured, where there is no git")
    parser.add_argument("--logs", type=Path, default=Path())
    parser.add_argument("--output", type=Path)
    parser.add_argument("--offline-in", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.offline_in is not None:
        flags = arguments.flags.split()
        measured = measure_offline(arguments.offline_in, flags, arguments.offline_repeats)
        print(json.dumps(measured))
        return

    result: dict[str, Any] = {
        "commit": arguments.commit,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "card": _card(),
        "layers": arguments.layers,
        "flags": arguments.flags,
    }
    with TemporaryDirectory() as name:
        model_dir = Path(name)
        write_model(model_dir, arguments.layers)
        arguments.logs.mkdir(parents=True, exist_ok=True)
        for stack in arguments.stacks:
            log = arguments.logs / f"serve-{stack}.log"
            result[stack] = measure_stack(stack, model_dir, arguments.flags.split(), log)
            _keep(stack, result, arguments.output)
        if arguments.offline:
            repeats = ("--offline-repeats", str(arguments.offline_repeats))
            flags = (f"--flags={arguments.flags}", "--offline-in", name, *repeats)
            command = [sys.executable, "-m", "benchmarks.gpu.serve", *flags]
            done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
            result["offline"] = json.loads(done.stdout.splitlines()[-1])
            _keep("offline", result, arguments.output)


def _keep(name: str, result: dict[str, Any], output: Path | None) -> None:
    print(name, json.dumps(result[name]), flush=True)
    if output is not None:
        output.write_text(json.dumps(result, indent=1) + "\n")


def _card() -> str:
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


if __name__ == "__main__":
    main()
