"""What Prometheus sees. vLLM's names for what vLLM has; ours start with `tandem:`.

Each process has a registry of its own; docs/metrics.md lists all names.
"""

import functools
from collections.abc import Callable, Mapping
from typing import TypeVar

from prometheus_client import CollectorRegistry, Gauge
from prometheus_client import Counter as CounterFamily
from prometheus_client import Histogram as HistogramFamily

from protocol.records import WorkerLoad
from protocol.request import PhaseTimings
from services.runtime.instruments import Counter, Histogram

FamilyT = TypeVar("FamilyT", CounterFamily, HistogramFamily)

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
_TRANSFER_BUCKETS = (
    *(0.0001, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0),
)


class _Labelled:
    """Makes metrics that all carry the same first labels."""

    def __init__(self, registry: CollectorRegistry, labels: Mapping[str, str]) -> None:
        self._registry = registry
        self._labels = labels

    def counter(self, name: str, text: str) -> Counter:
        return Counter(name, text, labels=self._labels, registry=self._registry)

    def counters(self, name: str, text: str, *more: str) -> CounterFamily:
        return CounterFamily(name, text, (*self._labels, *more), registry=self._registry)

    def gauge(self, name: str, text: str) -> Gauge:
        return self.gauges(name, text).labels(**self._labels)

    def gauges(self, name: str, text: str, *more: str) -> Gauge:
        return Gauge(name, text, (*self._labels, *more), registry=self._registry)

    def histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(name, text, buckets, labels=self._labels, registry=self._registry)

    def histograms(
        self, name: str, text: str, buckets: tuple[float, ...], *more: str
    ) -> HistogramFamily:
        return HistogramFamily(
            name, text, (*self._labels, *more), registry=self._registry, buckets=buckets
        )

    def by_label(self, family: FamilyT) -> Callable[[str], FamilyT]:
        """A family's members by their one further label, each looked up once only."""
        return functools.cache(functools.partial(family.labels, *self._labels.values()))


class WorkerMetrics:
    """A prefill or decode worker's metrics, labelled `model_name` and `engine` (its id)."""

    def __init__(self, *, model_name: str, worker_id: str) -> None:
        self.registry = CollectorRegistry()
        self._labels = {"model_name": model_name, "engine": worker_id}
        make = _Labelled(self.registry, self._labels)
        self._running = make.gauge("vllm:num_requests_running", "Sequences in the batch.")
        self._waiting = make.gauge("vllm:num_requests_waiting", "Sequences that wait.")
        self._swapped = make.gauge(
            "vllm:num_requests_swapped", "Sequences that wait with their KV in host memory."
        )
        self._usage = make.gauge("vllm:kv_cache_usage_perc", "Share of KV blocks in use, 0 to 1.")
        self._prompt_tokens = make.counter("vllm:prompt_tokens", "Prompt tokens computed here.")
        self._generated = make.counter("vllm:generation_tokens", "Tokens generated here.")
        self._forced = make.counter(
            "tandem:forced_tokens",
            "Generated tokens that a grammar left no choice about, appended without sampling.",
        )
        self._preemptions = make.counter("vllm:num_preemptions", "Sequences preempted.")
        self._queries = make.counter(
            "vllm:prefix_cache_queries", "Tokens looked up in the prefix cache."
        )
        self._hits = make.counter("vllm:prefix_cache_hits", "Tokens found in the prefix cache.")
        self._blocks = make.gauges("tandem:kv_blocks", "KV blocks by state.", "state")
        self._received = make.counters(
            "tandem:kv_transfer_received_bytes", "KV bytes received.", "peer"
        )
        self._sent = make.counters("tandem:kv_transfer_sent_bytes", "KV bytes sent.", "peer")
        self._transfer_seconds = make.histograms(
            "tandem:kv_transfer_seconds", "Duration of one write.", _TRANSFER_BUCKETS, "peer"
        )
        self._gb_per_s = make.gauges(
            "tandem:kv_transfer_gb_per_s", "Measured rate to this peer, 10^9 bytes/s.", "peer"
        )
        self._exposed = make.histogram(
            "tandem:kv_transfer_exposed_seconds",
            "Transfer time behind the first token, not hidden by computation.",
            _TRANSFER_BUCKETS,
        )

    def observe_load(self, load: WorkerLoad) -> None:
        """The state of the moment."""
        self._running.set(load.num_running)
        self._waiting.set(load.num_waiting)
        in_use = load.num_referenced_blocks + load.num_quarantined_blocks
        total = in_use + load.num_free_blocks + load.num_cached_blocks
        self._usage.set(in_use / total if total else 0.0)
        for state, count in (
            ("free", load.num_free_blocks),
            ("referenced", load.num_referenced_blocks),
            ("cached", load.num_cached_blocks),
            ("quarantined", load.num_quarantined_blocks),
        ):
            self._blocks.labels(**self._labels, state=state).set(count)
        for peer, rate in load.transfer_gb_per_s.items():
            self._gb_per_s.labels(**self._labels, peer=peer).set(rate)

    def observe_tokens(self, *, num_prompt: int, num_generated: int, num_forced: int = 0) -> None:
        """`num_forced` of the generated ones were never sampled."""
        self._prompt_tokens.inc(num_prompt)
        self._generated.inc(num_generated)
        self._forced.inc(num_forced)

    def observe_cache(self, *, num_queried: int, num_hit: int) -> None:
        """More tokens looked up and found since the last call."""
        self._queries.inc(num_queried)
        self._hits.inc(num_hit)

    def observe_preemptions(self, num_preempted: int, *, num_swapped: int) -> None:
        """More preemptions since the last call, and how many sequences are swapped now."""
        self._preemptions.inc(num_preempted)
        self._swapped.set(num_swapped)

    def observe_received(self, peer: str, *, num_bytes: int, seconds: float) -> None:
        self._received.labels(**self._labels, peer=peer).inc(num_bytes)
        self._transfer_seconds.labels(**self._labels, peer=peer).observe(seconds)

    def observe_sent(self, peer: str, *, num_bytes: int, seconds: float) -> None:
        self._sent.labels(**self._labels, peer=peer).inc(num_bytes)
        self._transfer_seconds.labels(**self._labels, peer=peer).observe(seconds)

    def observe_exposed_transfer(self, seconds: float) -> None:
        self._exposed.observe(seconds)


class RouterMetrics:
    """A router's metrics: what clients experience, and its view of the workers."""

    def __init__(self, *, model_name: str) -> None:
        self.registry = CollectorRegistry()
        self._labels = {"model_name": model_name}
        make = _Labelled(self.registry, self._labels)
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
        self._prompt_lengths = make.histogram(
            "vllm:request_prompt_tokens", "Prompt tokens a request.", _LENGTH_BUCKETS
        )
        self._output_lengths = make.histogram(
            "vllm:request_generation_tokens", "Output tokens a request.", _LENGTH_BUCKETS
        )
        self._prompt_tokens = make.counter("vllm:prompt_tokens", "Prompt tokens of requests.")
        self._generated = make.counter("vllm:generation_tokens", "Tokens delivered.")
        self._queries = make.counter("vllm:prefix_cache_queries", "Prompt tokens of requests.")
        self._hits = make.counter(
            "vllm:prefix_cache_hits", "Prompt tokens that needed no computing."
        )
        self._success = make.by_label(
            make.counters("vllm:request_success", "Finished requests by reason.", "finished_reason")
        )
        self._running = make.gauges("vllm:num_requests_running", "Per worker.", "engine")
        self._waiting = make.gauges("vllm:num_requests_waiting", "Per worker.", "engine")
        self._usage = make.gauges("vllm:kv_cache_usage_perc", "Per worker, 0 to 1.", "engine")
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

    def request_ended(
        self,
        *,
        finished_reason: str,
        num_prompt_tokens: int,
        num_cached_tokens: int,
        num_output_tokens: int,
        e2e_s: float,
        ttft_s: float | None,
    ) -> None:
        """A request is answered (or given up: then `finished_reason` is "abort" or "error")."""
        self._success(finished_reason).inc()
        self._prompt_tokens.inc(num_prompt_tokens)
        self._generated.inc(num_output_tokens)
        self._queries.inc(num_prompt_tokens)
        self._hits.inc(num_cached_tokens)
        self._prompt_lengths.observe(num_prompt_tokens)
        self._output_lengths.observe(num_output_tokens)
        self._e2e.observe(e2e_s)
        if ttft_s is not None:
            self._decode.observe(e2e_s - ttft_s)
            if num_output_tokens > 1:
                self._mean_tpot.observe((e2e_s - ttft_s) / (num_output_tokens - 1))

    def placed(self, kind: str) -> None:
        """`kind` is "remote" (prefill worker) or "local" (decode worker)."""
        self._placements(kind).inc()

    def retried(self) -> None:
        self._retries.inc()

    def observe_workers(
        self, loads: Mapping[str, WorkerLoad], states: Mapping[tuple[str, str], int]
    ) -> None:
        """`loads` by worker id; `states` counts workers by (role, state)."""
        for gauge in (self._running, self._waiting, self._usage, self._workers):
            gauge.clear()
        for worker_id, load in loads.items():
            labels = {**self._labels, "engine": worker_id}
            in_use = load.num_referenced_blocks + load.num_quarantined_blocks
            total = in_use + load.num_free_blocks + load.num_cached_blocks
            self._running.labels(**labels).set(load.num_running)
            self._waiting.labels(**labels).set(load.num_waiting)
            self._usage.labels(**labels).set(in_use / total if total else 0.0)
        for (role, state), count in states.items():
            self._workers.labels(**self._labels, role=role, state=state).set(count)

    def observe_queue(self, num_waiting: int) -> None:
        """Requests in the router's own queue, which no worker has seen yet."""
        self._queued.set(num_waiting)

    def observe_index(self, states: Mapping[str, int]) -> None:
        """Number of workers whose blocks the index knows exactly, or only in part."""
        for state, count in states.items():
            self._index.labels(**self._labels, state=state).set(count)
