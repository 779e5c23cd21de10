"""What Prometheus sees of a router: what clients experience. vLLM's names for what vLLM has."""

from collections.abc import Mapping
from dataclasses import dataclass

from prometheus_client import CollectorRegistry

from protocol.records import WorkerLoad
from protocol.request import PhaseTimings
from services.runtime.metrics import Labelled

_COUNT_BUCKETS = (1, 2, 5, 10, 20)
_TTFT_BUCKETS = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0),
)
_TOKEN_BUCKETS = (
    *(0.002, 0.005, 0.01, 0.015, 0.02, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5),
    *(0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)
_REQUEST_BUCKETS = (
    *(0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0),
    *(120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)
_LENGTH_BUCKETS = (
    *(1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000),
)


@dataclass(frozen=True, slots=True)
class EndedRequest:
    """What became of a request; given up, its `finished_reason` is "abort" or "error".

    `n` and `max_tokens` are what it asked for. Times are None if it didn't come so far.
    """

    finished_reason: str
    num_prompt_tokens: int
    num_cached_tokens: int
    num_output_tokens: int
    num_longest_output_tokens: int
    n: int
    max_tokens: int
    e2e_s: float
    ttft_s: float | None
    prefill_s: float | None


class RouterMetrics:
    """A router's metrics: what clients experience, and its view of the workers."""

    def __init__(self, *, model_name: str) -> None:
        self.registry = CollectorRegistry()
        self._labels = {"model_name": model_name}
        make = Labelled(self.registry, self._labels)
        self._ttft = make.histogram(
            "vllm:time_to_first_token_seconds", "From arrival to the first token.", _TTFT_BUCKETS
        )
        self._tpot = make.histogram(
            "vllm:time_per_output_token_seconds", "Between two tokens.", _TOKEN_BUCKETS
        )
        self._itl = make.histogram(
            "vllm:inter_token_latency_seconds", "Between two tokens.", _TOKEN_BUCKETS
        )
        self._mean_tpot = make.histogram(
            "vllm:request_time_per_output_token_seconds",
            "A request's mean time between tokens.",
            _TOKEN_BUCKETS,
        )
        self._e2e = make.histogram(
            "vllm:e2e_request_latency_seconds", "From arrival to the end.", _REQUEST_BUCKETS
        )
        self._queue = make.histogram(
            "vllm:request_queue_time_seconds", "Waiting on workers.", _REQUEST_BUCKETS
        )
        self._prefill = make.histogram(
            "vllm:request_prefill_time_seconds", "Computing the prompt.", _REQUEST_BUCKETS
        )
        self._decode = make.histogram(
            "vllm:request_decode_time_seconds", "From first token to last.", _REQUEST_BUCKETS
        )
        self._inference = make.histogram(
            "vllm:request_inference_time_seconds", "Computing, from start to end.", _REQUEST_BUCKETS
        )
        self._prompt_lengths = make.histogram(
            "vllm:request_prompt_tokens", "Prompt tokens a request.", _LENGTH_BUCKETS
        )
        self._output_lengths = make.histogram(
            "vllm:request_generation_tokens", "Output tokens a request.", _LENGTH_BUCKETS
        )
        self._longest_outputs = make.histogram(
            "vllm:request_max_num_generation_tokens",
            "Tokens of a request's longest output.",
            _LENGTH_BUCKETS,
        )
        self._params_n = make.histogram(
            "vllm:request_params_n", "Outputs a request asks for.", _COUNT_BUCKETS
        )
        self._params_max_tokens = make.histogram(
            "vllm:request_params_max_tokens", "Tokens it allows an output.", _LENGTH_BUCKETS
        )
        self._prompt_tokens = make.counter("vllm:prompt_tokens", "Prompt tokens of requests.")
        self._generated = make.counter("vllm:generation_tokens", "Tokens delivered.")
        self._queries = make.counter("vllm:prefix_cache_queries", "Prompt tokens of requests.")
        self._hits = make.counter(
            "vllm:prefix_cache_hits", "Prompt tokens that needed no computing."
        )
        self._cached = make.counter("vllm:prompt_tokens_cached", "The same, as vLLM counts it now.")
        self._success = make.by_label(
            make.counters("vllm:request_success", "Finished requests by reason.", "finished_reason")
        )
        self._running = make.gauges("vllm:num_requests_running", "Per worker.", "engine")
        self._waiting = make.gauges("vllm:num_requests_waiting", "Per worker.", "engine")
        self._usage = make.gauges("vllm:kv_cache_usage_perc", "Per worker, 0 to 1.", "engine")
        self._old_usage = make.gauges("vllm:gpu_cache_usage_perc", "Older name of that.", "engine")
        self._phase = make.by_label(
            make.histograms(
                "tandem:ttft_phase_seconds",
                "Parts of the time to first token.",
                _TTFT_BUCKETS,
                "phase",
            )
        )
        self._placements = make.by_label(
            make.counters("tandem:placements", "Requests placed, by kind of prefill.", "kind")
        )
        self._retries = make.counter("tandem:request_retries", "Attempts after the first.")
        self._workers = make.gauges("tandem:workers", "Workers by role and state.", "role", "state")
        self._queued = make.gauge(
            "tandem:queued_requests", "Requests in the router, beyond what the workers hold."
        )
        self._index = make.gauges(
            "tandem:prefix_index_workers", "Workers in the prefix index by state.", "state"
        )

    def first_token(self, ttft_s: float) -> None:
        self._ttft.observe(ttft_s)

    def next_tokens(self, gap_s: float, num_tokens: int) -> None:
        """`num_tokens` tokens, at least one, came `gap_s` after the one before them."""
        self._tpot.observe(gap_s / num_tokens, num_tokens)
        self._itl.observe(gap_s / num_tokens, num_tokens)

    def phases(self, timings: PhaseTimings) -> None:
        """A request's parts of its time to first token, as the workers measured them."""
        for phase, seconds in (
            ("prefill_queue", timings.prefill_queue_s),
            ("prefill", timings.prefill_s),
            ("transfer", timings.transfer_s),
            ("exposed_transfer", timings.exposed_transfer_s),
            ("decode_queue", timings.decode_queue_s),
            ("first_step", timings.first_step_s),
        ):
            if seconds is not None:
                self._phase(phase).observe(seconds)
        self._queue.observe((timings.prefill_queue_s or 0.0) + (timings.decode_queue_s or 0.0))
        if timings.prefill_s is not None:
            self._prefill.observe(timings.prefill_s)

    def request_ended(self, request: EndedRequest) -> None:
        """It's answered, or given up."""
        self._success(request.finished_reason).inc()
        self._prompt_tokens.inc(request.num_prompt_tokens)
        self._generated.inc(request.num_output_tokens)
        self._queries.inc(request.num_prompt_tokens)
        self._hits.inc(request.num_cached_tokens)
        self._cached.inc(request.num_cached_tokens)
        self._prompt_lengths.observe(request.num_prompt_tokens)
        self._output_lengths.observe(request.num_output_tokens)
        self._longest_outputs.observe(request.num_longest_output_tokens)
        self._params_n.observe(request.n)
        self._params_max_tokens.observe(request.max_tokens)
        self._e2e.observe(request.e2e_s)
        if request.ttft_s is None:
            return
        decode_s = request.e2e_s - request.ttft_s
        self._decode.observe(decode_s)
        if request.prefill_s is not None:
            self._inference.observe(request.prefill_s + decode_s)
        if request.num_output_tokens > 1:
            self._mean_tpot.observe(decode_s / (request.num_output_tokens - 1))

    def placed(self, kind: str) -> None:
        """`kind` is "remote" (prefill worker) or "local" (decode worker)."""
        self._placements(kind).inc()

    def retried(self) -> None:
        self._retries.inc()

    def observe_workers(
        self, loads: Mapping[str, WorkerLoad], states: Mapping[tuple[str, str], int]
    ) -> None:
        """`loads` by worker id; `states` counts workers by (role, state)."""
        gauges = (self._running, self._waiting, self._usage, self._old_usage, self._workers)
        for gauge in gauges:
            gauge.clear()
        for worker_id, load in loads.items():
            labels = {**self._labels, "engine": worker_id}
            in_use = load.num_referenced_blocks + load.num_quarantined_blocks
            total = in_use + load.num_free_blocks + load.num_cached_blocks
            self._running.labels(**labels).set(load.num_running)
            self._waiting.labels(**labels).set(load.num_waiting)
            self._usage.labels(**labels).set(in_use / total if total else 0.0)
            self._old_usage.labels(**labels).set(in_use / total if total else 0.0)
        for (role, state), count in states.items():
            self._workers.labels(**self._labels, role=role, state=state).set(count)

    def observe_queue(self, num_waiting: int) -> None:
        """Requests in the router's own queue, which no worker has seen yet."""
        self._queued.set(num_waiting)

    def observe_index(self, states: Mapping[str, int]) -> None:
        """Number of workers whose blocks the index knows exactly, or only in part."""
        for state, count in states.items():
            self._index.labels(**self._labels, state=state).set(count)
