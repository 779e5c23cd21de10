"""Which requests are sent and when: synthetic ones, or a trace's."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from loadtest.config import BenchConfig
from loadtest.prompt_text import PromptWriter
from loadtest.traces import TraceRequest


@dataclass(frozen=True, slots=True)
class PlannedRequest:
    """A prompt to send `offset_s` after the start, or as soon as a place is free if None."""

    prompt: str
    output_len: int
    offset_s: float | None = None


def synthetic_requests(config: BenchConfig, writer: PromptWriter) -> list[PlannedRequest]:
    """Prompts of `input_len` tokens, of which `prefix_len` are one of `num_prefixes` prefixes."""
    arrivals = random.Random(f"{config.seed} arrivals")
    prefix_len = min(config.prefix_len, config.input_len)
    prefixes = [
        writer.write(prefix_len, random.Random(f"{config.seed} prefix {index}"))
        for index in range(config.num_prefixes)
    ]
    requests: list[PlannedRequest] = []
    offset_s = 0.0
    for index in range(config.num_prompts):
        rng = random.Random(f"{config.seed} prompt {index}")
        own = writer.write(config.input_len - prefix_len, rng)
        prompt = prefixes[index % len(prefixes)] + own
        if config.request_rate is None:
            requests.append(PlannedRequest(prompt, config.output_len))
        else:
            requests.append(PlannedRequest(prompt, config.output_len, offset_s))
            offset_s += arrivals.expovariate(config.request_rate)
    return requests


def warmup_requests(config: BenchConfig, writer: PromptWriter) -> list[PlannedRequest]:
    """Prompts like the measured ones, none of which they equal."""
    return [
        PlannedRequest(
            writer.write(config.input_len, random.Random(f"{config.seed} warm-up {index}")),
            config.output_len,
        )
        for index in range(config.warmup_prompts)
    ]


def trace_requests(
    config: BenchConfig, trace: Sequence[TraceRequest], writer: PromptWriter
) -> list[PlannedRequest]:
    """The trace's first `num_prompts` requests, their times and token counts scaled.

    Equal blocks of the trace become equal pieces of text, so prefixes repeat as they did.
    """
    return [
        PlannedRequest(
            _trace_prompt(request, config, writer, index),
            max(1, round(request.output_len * config.trace_scale)),
            request.offset_s / config.trace_speed,
        )
        for index, request in enumerate(trace[: config.num_prompts])
    ]


def _trace_prompt(
    request: TraceRequest, config: BenchConfig, writer: PromptWriter, index: int
) -> str:
    left = max(1, round(request.input_len * config.trace_scale))
    block_len = max(1, round(request.block_len * config.trace_scale))
    pieces: list[str] = []
    for block_id in request.block_ids or (f"own {index}",):
        rng = random.Random(f"{config.seed} block {block_id}")
        length = min(left, block_len) if request.block_ids else left
        pieces.append(writer.write(length, rng))
        left -= length
    return "".join(pieces)
