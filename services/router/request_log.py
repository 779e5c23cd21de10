"""What is said about each request that ended: one line in the log, and its metrics."""

import logging
from typing import Any

from protocol.request import PhaseTimings
from services.router.dispatch.generation import Generation
from services.runtime.router_metrics import EndedRequest, RouterMetrics

logger = logging.getLogger(__name__)


def request_fields(generation: Generation) -> dict[str, Any]:
    """What is worth knowing about a finished generation; durations in milliseconds."""
    end_s = generation.end_s or generation.start_s
    first_s = generation.first_token_s
    fields: dict[str, Any] = {
        "request_id": generation.request_id,
        "outcome": outcome(generation),
        "prompt_tokens": generation.num_prompt_tokens,
        "cached_tokens": generation.num_cached_tokens,
        "output_tokens": generation.num_output_tokens,
        "outputs": len(generation.outputs),
        "e2e_ms": _ms(end_s - generation.start_s),
        "ttft_ms": None if first_s is None else _ms(first_s - generation.start_s),
    }
    flight = generation.outputs[0].flight
    if flight is not None and flight.route is not None:
        prefill = flight.route.prefill
        fields["prefill"] = None if prefill is None else prefill.worker_id
        fields["decode"] = flight.route.decode.worker_id
    if generation.num_retries:
        fields["retries"] = generation.num_retries
    phases = {name.removesuffix("_s") + "_ms": _ms(s) for name, s in generation.phases.items()}
    return fields | phases


def outcome(generation: Generation) -> str:
    """`stop`, `length`, `abort` or `error`; of several outputs, the first one's."""
    if generation.error is not None:
        return "error"
    if generation.aborted:
        return "abort"
    return generation.outputs[0].choice.finish_reason or "abort"


def log_request(generation: Generation) -> None:
    fields = request_fields(generation)
    if generation.error is not None:
        fields["error"] = str(generation.error)
    line = " ".join(f"{name}={value}" for name, value in fields.items() if value is not None)
    logger.info("request %s", line, extra={"fields": fields})


def _ms(seconds: float) -> float:
    return round(1000 * seconds, 1)


class RequestReports:
    """Tells metrics and log about each request that ended."""

    def __init__(self, metrics: RouterMetrics, *, log_requests: bool) -> None:
        """`log_requests` may be changed at any time."""
        self._metrics = metrics
        self.log_requests = log_requests

    def ended(self, generation: Generation) -> None:
        assert generation.end_s is not None, "reported when it's over"
        first_s, start_s = generation.first_token_s, generation.start_s
        phases = PhaseTimings(**generation.phases)
        lengths = [output.choice.num_tokens for output in generation.outputs]
        self._metrics.request_ended(
            EndedRequest(
                finished_reason=outcome(generation),
                num_prompt_tokens=generation.num_prompt_tokens,
                num_cached_tokens=generation.num_cached_tokens,
                num_output_tokens=generation.num_output_tokens,
                num_longest_output_tokens=min(max(lengths), generation.num_output_tokens),
                n=generation.spec.sampling.n,
                max_tokens=max(generation.spec.max_tokens),
                e2e_s=generation.end_s - start_s,
                ttft_s=None if first_s is None else first_s - start_s,
                prefill_s=phases.prefill_s,
            )
        )
        if generation.phases:
            self._metrics.phases(phases)
        for _ in range(generation.num_retries):
            self._metrics.retried()
        if self.log_requests:
            log_request(generation)
