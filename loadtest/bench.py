"""A whole run: find the model, write the prompts, warm up, load, report."""

import asyncio
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import msgspec
from tqdm import tqdm

from loadtest.client import LoadClient
from loadtest.config import BenchConfig
from loadtest.http_connection import HttpClient, HttpError
from loadtest.prompt_text import PromptWriter
from loadtest.report import format_summary, write_requests, write_summary
from loadtest.results import RequestResult, Summary, summarize
from loadtest.runner import run_load
from loadtest.traces import read_trace
from loadtest.workload import (
    PlannedRequest,
    synthetic_requests,
    trace_requests,
    warmup_requests,
)
from protocol.decoding import decode
from protocol.errors import StartupError, UnreadableError

_DEFAULT_CONCURRENCY = 8


class _Model(msgspec.Struct):
    id: str
    root: str | None = None


class _Models(msgspec.Struct):
    data: list[_Model]


_models = msgspec.json.Decoder(_Models)


@dataclass(frozen=True, slots=True)
class Measurement:
    """What one run brought; `model` is the name that was asked for."""

    model: str
    results: list[RequestResult]
    summary: Summary


def run_bench(config: BenchConfig) -> int:
    """Runs, prints and writes what `config` says; 1 if a request failed."""
    measured = asyncio.run(measure(config))
    sys.stdout.write(format_summary(measured.summary) + "\n")
    if config.result_file is not None:
        write_summary(Path(config.result_file), measured.summary, config, measured.model)
    if config.requests_file is not None:
        write_requests(Path(config.requests_file), measured.results)
    return 1 if measured.summary.errors else 0


async def measure(config: BenchConfig) -> Measurement:
    """Loads the server. Raises StartupError if that can't be done at all."""
    async with HttpClient(config.base_url, api_key=config.api_key) as http:
        served = await _find_model(http, config)
        requests, warmup = _plan(config, _writer(config, served))
        model = config.model or served.id
        client = LoadClient(http, config, model)
        await _warm_up(client, warmup)
        concurrency = config.max_concurrency
        if concurrency is None and requests[0].offset_s is None:
            concurrency = _DEFAULT_CONCURRENCY
        # On a terminal only: a log has no use for a bar.
        with tqdm(total=len(requests), unit="req", disable=None, file=sys.stderr) as bar:
            results, duration_s = await run_load(
                client, requests, max_concurrency=concurrency, on_result=_progress(bar)
            )
    return Measurement(model, results, summarize(results, duration_s))


async def _warm_up(client: LoadClient, requests: list[PlannedRequest]) -> None:
    for index, request in enumerate(requests):
        now_s = time.perf_counter()
        result = await client.send(request, index=index, start_s=now_s, due_s=now_s)
        if result.error is not None:
            raise StartupError(f"The first request failed: {result.error}.")


def _plan(
    config: BenchConfig, writer: PromptWriter
) -> tuple[list[PlannedRequest], list[PlannedRequest]]:
    """The requests to measure, and those to send before."""
    if config.trace is not None:
        requests = trace_requests(config, read_trace(Path(config.trace)), writer)
    else:
        requests = synthetic_requests(config, writer)
    return requests, warmup_requests(config, writer)


async def _find_model(http: HttpClient, config: BenchConfig) -> _Model:
    try:
        status, body = await http.fetch("GET", "/v1/models")
    except HttpError as error:
        raise StartupError(f"{config.base_url} doesn't answer: {error}.") from error
    if status != 200:
        raise StartupError(f"{config.base_url}/v1/models answers with status {status}.")
    try:
        models = decode(_models, body).data
    except UnreadableError as error:
        raise StartupError(f"{config.base_url} is no OpenAI-compatible server.") from error
    wanted = [model for model in models if config.model in (None, model.id)]
    if not wanted:
        names = ", ".join(model.id for model in models)
        raise StartupError(f"{config.base_url} doesn't serve {config.model}, but {names}.")
    return wanted[0]


def _writer(config: BenchConfig, model: _Model) -> PromptWriter:
    if config.tokenizer is not None:
        return PromptWriter.for_tokenizer(Path(config.tokenizer))
    if model.root is not None and (Path(model.root) / "tokenizer.json").is_file():
        return PromptWriter.for_tokenizer(Path(model.root))
    return PromptWriter.for_any_model()


def _progress(bar: "tqdm[NoReturn]") -> Callable[[RequestResult], None]:
    """Advances the bar and shows the rate of output tokens and the number of failures."""
    num_tokens = num_errors = 0

    def advance(result: RequestResult) -> None:
        nonlocal num_tokens, num_errors
        num_tokens += result.output_tokens
        num_errors += result.error is not None
        elapsed_s = max(1e-9, float(bar.format_dict["elapsed"]))
        failed = f", {num_errors} failed" if num_errors else ""
        bar.set_postfix_str(f"{num_tokens / elapsed_s:,.0f} tok/s{failed}", refresh=False)
        bar.update()

    return advance
