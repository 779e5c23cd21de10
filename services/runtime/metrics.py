"""What Prometheus sees of workers. vLLM's names for what vLLM has; ours start with `tandem:`.

Each process has a registry of its own; docs/metrics.md lists all names.
"""

import functools
from collections.abc import Callable, Mapping
from typing import TypeVar

from prometheus_client import CollectorRegistry, Gauge
from prometheus_client import Counter as CounterFamily
from prometheus_client import Histogram as HistogramFamily

from protocol.records import WorkerLoad
from services.runtime.instruments import Counter, Histogram

FamilyT = TypeVar("FamilyT", CounterFamily, HistogramFamily)

_STEP_BUCKETS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
_TRANSFER_BUCKETS = (
    *(0.0001, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0),
)


class Labelled:
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
        make = Labelled(self.registry, self._labels)
        self._running = make.gauge("vllm:num_requests_running", "Sequences in the batch.")
        self._waiting = make.gauge("vllm:num_requests_waiting", "Sequences that wait.")
        self._swapped = make.gauge(
            "vllm:num_requests_swapped", "Sequences that wait with their KV in host memory."
        )
        self._usage = make.gauge("vllm:kv_cache_usage_perc", "Share of KV blocks in use, 0 to 1.")
        self._old_usage = make.gauge("vllm:gpu_cache_usage_perc", "Older name of that.")
        self._step_tokens = make.histogram(
            "vllm:iteration_tokens_total", "Tokens of one step.", _STEP_BUCKETS
        )
        self._cache_config = make.gauges(
            "vllm:cache_config_info", "The pool, as labels.", "block_size", "num_gpu_blocks"
        )
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

    def describe_pool(self, *, block_size: int, num_blocks: int) -> None:
        sizes = {"block_size": str(block_size), "num_gpu_blocks": str(num_blocks)}
        self._cache_config.labels(**self._labels, **sizes).set(1)

    def observe_load(self, load: WorkerLoad) -> None:
        """The state of the moment."""
        self._running.set(load.num_running)
        self._waiting.set(load.num_waiting)
        in_use = load.num_referenced_blocks + load.num_quarantined_blocks
        total = in_use + load.num_free_blocks + load.num_cached_blocks
        self._usage.set(in_use / total if total else 0.0)
        self._old_usage.set(in_use / total if total else 0.0)
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
        """Those of a step; `num_forced` of the generated ones were never sampled."""
        if num_prompt + num_generated:
            self._step_tokens.observe(num_prompt + num_generated)
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
