"""What was measured of each request, and of all together."""

import math
from collections import Counter
from collections.abc import Iterable, Sequence

import msgspec

PERCENTILES = (50, 90, 95, 99)


class RequestResult(msgspec.Struct, kw_only=True):
    """One request as its client saw it; times in seconds.

    `start_s` counts from the start of the run. `gaps_s` are the times between pieces of text: a
    piece may hold several tokens, so the time per token is `time_per_token_s`.
    """

    index: int
    start_s: float
    late_s: float = 0.0
    error: str | None = None
    status: int | None = None
    finish_reason: str | None = None
    prompt_tokens: int = 0
    cached_tokens: int | None = None
    output_tokens: int = 0
    first_token_s: float | None = None
    end_to_end_s: float = 0.0
    gaps_s: list[float] = []

    @property
    def time_per_token_s(self) -> float | None:
        """Seconds a token after the first one."""
        if self.first_token_s is None or self.output_tokens < 2:
            return None
        return (self.end_to_end_s - self.first_token_s) / (self.output_tokens - 1)


class Distribution(msgspec.Struct):
    """Milliseconds."""

    mean: float
    percentiles: dict[str, float]
    maximum: float


class Summary(msgspec.Struct, kw_only=True):
    """A run's figures; only completed requests count for tokens and times."""

    num_requests: int
    num_completed: int
    errors: dict[str, int]
    duration_s: float
    requests_per_s: float
    output_tokens_per_s: float
    prompt_tokens_per_s: float
    mean_prompt_tokens: float
    mean_output_tokens: float
    cached_tokens_share: float | None
    ttft_ms: Distribution | None
    tpot_ms: Distribution | None
    itl_ms: Distribution | None
    e2e_ms: Distribution | None
    max_late_ms: float


def summarize(results: Sequence[RequestResult], duration_s: float) -> Summary:
    """Figures of a run that took `duration_s` from the first request to the last answer."""
    completed = [result for result in results if result.error is None]
    prompt_tokens = sum(result.prompt_tokens for result in completed)
    output_tokens = sum(result.output_tokens for result in completed)
    known = [result for result in completed if result.cached_tokens is not None]
    known_prompt_tokens = sum(result.prompt_tokens for result in known)
    return Summary(
        num_requests=len(results),
        num_completed=len(completed),
        errors=dict(Counter(result.error for result in results if result.error is not None)),
        duration_s=duration_s,
        requests_per_s=len(completed) / duration_s,
        output_tokens_per_s=output_tokens / duration_s,
        prompt_tokens_per_s=prompt_tokens / duration_s,
        mean_prompt_tokens=prompt_tokens / max(1, len(completed)),
        mean_output_tokens=output_tokens / max(1, len(completed)),
        cached_tokens_share=(
            sum(result.cached_tokens or 0 for result in known) / known_prompt_tokens
            if known_prompt_tokens
            else None
        ),
        ttft_ms=distribution(r.first_token_s for r in completed),
        tpot_ms=distribution(r.time_per_token_s for r in completed),
        itl_ms=distribution(gap for r in completed for gap in r.gaps_s),
        e2e_ms=distribution(r.end_to_end_s for r in completed),
        max_late_ms=1000 * max((r.late_s for r in results), default=0.0),
    )


def distribution(values_s: Iterable[float | None]) -> Distribution | None:
    """Mean, percentiles and maximum in milliseconds; None if there are no values."""
    ordered = sorted(1000 * value for value in values_s if value is not None)
    if not ordered:
        return None
    return Distribution(
        mean=sum(ordered) / len(ordered),
        percentiles={f"p{percent}": percentile(ordered, percent) for percent in PERCENTILES},
        maximum=ordered[-1],
    )


def percentile(ordered: Sequence[float], percent: float) -> float:
    """Linear interpolation between the closest of the `ordered` values, as numpy's default."""
    position = (len(ordered) - 1) * percent / 100
    low = math.floor(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)
